"""Which backend `optimizer.backend: auto` takes on a GPU: by recorded times, or by what has to be computed.

A time taken at the start of a run says little there, since a model actor may be using the same GPU. The record is
gpu_steps.json beside this file; `python -m benchmarks.gpu --record FILE` adds what was measured on a device to it.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

Backend = Literal["dense", "sparse"]
WITHIN = 2.0
"""Largest factor by which the features, and the tokens, of two shapes that are near each other differ."""


class MeasuredStep(NamedTuple):
    """How long one training step took on an otherwise idle GPU."""

    device: str
    """Name of the GPU as torch gives it."""
    features: int
    """Features of the dictionary that was trained."""
    tokens: int
    """Tokens of the batch that was trained on."""
    backend: Backend
    """How the step's loss was computed."""
    bfloat16: bool
    """Whether the step's products were bfloat16."""
    milliseconds: float
    """Median time of the whole step, milliseconds."""


@cache
def measured_steps() -> tuple[MeasuredStep, ...]:
    """All training steps of the record gpu_steps.json."""
    rows = json.loads((resources.files("mtc.training") / "gpu_steps.json").read_text())
    return tuple(MeasuredStep(**row) for row in rows)


def choose_backend(
    device: str, features: int, tokens: int, bfloat16: bool, steps: tuple[MeasuredStep, ...] | None = None
) -> tuple[Backend, str]:
    """The backend for batches of `tokens` on a GPU of this name, and why.

    Only what gives the same numbers up to float32's rounding is compared: dense products in bfloat16 do not, while the
    sparse backend computes the values that it found in bfloat16 again.
    """
    rows = measured_steps() if steps is None else steps
    same = [r for r in rows if r.device == device and r.bfloat16 == (bfloat16 and r.backend == "sparse")]
    shapes: dict[tuple[int, int], dict[Backend, float]] = {}
    for row in same:
        shapes.setdefault((row.features, row.tokens), {})[row.backend] = row.milliseconds

    def distance(shape: tuple[int, int]) -> float:
        """How far a measured shape is from this one: the larger of the two ratios, as a logarithm."""
        return max(abs(math.log(shape[0] / features)), abs(math.log(shape[1] / tokens)))

    both = [shape for shape, times in shapes.items() if len(times) == 2 and distance(shape) <= math.log(WITHIN)]
    if not both:
        return "sparse", f"no step was measured on {device} near this shape; one product instead of five"
    closest = min(both, key=distance)
    times = shapes[closest]
    said = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in sorted(times.items()))
    fastest: Backend = "dense" if times["dense"] < times["sparse"] else "sparse"
    return fastest, f"{device}, {closest[0]:,} features, {closest[1]:,} tokens: {said}"
