"""The rows that all contenders of benchmarks.quality read: cached activations, scaled, in float32.

Sources are RMS-normalised per token. Targets are multiplied by one number, so that those which are not massive have a
mean squared norm of d_target. A token is massive if the norm of its target is above MASSIVE_RATIO times the median of
the first MASSIVE_SAMPLE training rows; at some layers 0.2 to 7 % of the tokens are, and hold most of the variance.
Scaled by all rows instead, what is left of the others would depend on a handful of tokens (a sixth of that norm at
SmolLM2 layer 11), and the learning rates and initial weights that the peers are made for expect rows of that size.
Our transcoder scales targets by itself, whatever it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.activations import Part, load
from mtc.storage import cache_directory
from mtc.transcoder import MASSIVE_RATIO

MASSIVE_SAMPLE = 16_384


class Rows(NamedTuple):
    train: Part
    validation: Part
    """For choosing settings and calibrating thresholds."""
    test: Part
    """For the figures that are reported."""
    massive_norm: float
    """A token whose scaled target has a larger norm is massive."""
    file: Path
    """Safetensors with train.source, train.target and so on, float32 [tokens, d_model]: what peers read."""

    def typical(self, part: Part) -> Tensor:
        """[tokens] bool: whether a row of a part is not massive."""
        return torch.cat([rows.norm(dim=1) <= self.massive_norm for rows in part.target.split(16_384)])


def load_rows(model: str, layer: int, tokens: int) -> Rows:
    """The first `tokens` of the training order and both held-out parts, mapped from a file made at first use."""
    file = Path(cache_directory()) / "benchmarks" / f"rows-{model}-layer{layer}-{tokens}-typical.safetensors"
    if not file.exists():
        _make(model, layer, tokens, file)
    found = load_file(file)
    parts = (Part(found[f"{name}.source"], found[f"{name}.target"]) for name in ("train", "validation", "test"))
    return Rows(*parts, float(found["massive_norm"]), file)


def _make(model: str, layer: int, tokens: int, file: Path) -> None:
    activations = load(model, layer, tokens)
    norms = activations.train.target.float().norm(dim=1)
    massive_norm = MASSIVE_RATIO * norms[:MASSIVE_SAMPLE].median()
    size = norms[norms <= massive_norm].double().square().mean()
    factor = (activations.train.target.shape[1] / size).sqrt().float()
    scaled = {"massive_norm": massive_norm * factor}
    for name, part in activations._asdict().items():
        x = part.source.float()
        scaled[f"{name}.source"] = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        scaled[f"{name}.target"] = part.target.float() * factor
    save_file(scaled, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)
