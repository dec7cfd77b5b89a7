"""What waits on what: where a run's wall time went.

A trainer's wall time is split into parts that exclude each other, so they add up. The model actors' time is counted
beside it: where both have their own hardware they work at the same time, and the larger of the two decides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # who only reads figures, such as the service, should not pay for torch
    import torch

PARTS = ("waiting", "transport", "step", "all_reduce", "checkpoint", "other")
"""Of a trainer's wall time: waiting for activations; copying them into the shuffle buffer and batches out of it;
training, without what ranks waited for each other; that; writing checkpoints; the rest (logging)."""
MATRIX = 4096


class StreamTiming(BaseModel):
    """Wall time from the first activations to the last batch, since the run's last start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens: int
    """Tokens that left the shuffle buffers: trained on, and used for calibration."""
    wall_seconds: float
    """From the first activations to the last batch."""
    startup_seconds: float
    """Before that: the model actors load the language model and run their first unit."""
    trainers: int
    """Data-parallel trainers."""
    trainer_seconds: dict[str, float]
    """Seconds of `wall_seconds` by part of PARTS, mean over trainers; they add up to it."""
    actor_seconds: float
    """Wall time of the model actors, summed, over the units that trainers received after their first."""
    forward_seconds: float
    """Of these, in forward passes; on a GPU sending goes on meanwhile."""
    sending_seconds: float
    """Of these, putting activations into shared memory, or held back there."""
    idle_seconds: float
    """Of these, without a work unit: waiting for the trainers or for the scheduler."""
    captured_tokens: int
    """Token positions that ran through the language model, special tokens included."""
    forward_flops: float
    """Floating-point operations of these passes' matrix products."""
    device_flops: float
    """Rate that a model actor measured at its start with a large matrix product in the model's dtype, per second."""

    tokens_per_second: float
    """`tokens` / `wall_seconds`."""
    forward_mfu: float | None
    """Share of the measured rate that forward passes reached while they ran; None if no unit followed the first."""
    mfu: float | None
    """The same over all of `actor_seconds`: what the run made of the model actors' devices."""

    @property
    def waiting_share(self) -> float:
        """Share of the trainers' time that they waited for activations."""
        return self.trainer_seconds["waiting"] / self.wall_seconds

    @property
    def forward_share(self) -> float | None:
        """Share of the model actors' time that their forward passes took; None if no unit followed the first."""
        return self.forward_seconds / self.actor_seconds if self.actor_seconds else None


class Clock:
    """Seconds by part; a part inside another is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._stack = ["other"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def move(self, start: str, end: str, seconds: float) -> None:
        """Count `seconds` that were spent inside part `start` as `end`."""
        seconds = min(seconds, self.seconds[start])  # a device's spans may overlap its own work
        self.seconds[start] -= seconds
        self.seconds[end] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by part, up to now."""
        self._settle()
        return dict(self.seconds)

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class Stopwatch:
    """Seconds of a piece of work on a device, read when it is known to be done."""

    def __init__(self, device: torch.device):
        import torch

        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        if self._events:
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - start

    def seconds(self) -> float:
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def measure_device(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, median of a few."""
    import torch

    size = MATRIX if device.type == "cuda" else MATRIX // 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        watch = Stopwatch(device)
        with watch.running():
            product()
        return watch.seconds()

    times = [seconds(lambda: a @ b) for _ in range(7)]
    return 2 * size**3 / statistics.median(times[2:])
