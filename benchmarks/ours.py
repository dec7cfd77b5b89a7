"""This library behind the peers' protocol, and the yardstick: one dense product of the encoder's shape.

`python -m benchmarks.ours worker` obeys the JSON lines of `benchmarks.peer_worker.run_worker`, in this library's
environment.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.peer_worker import Peer, Work, run_worker
from mtc.config import RunConfig, load_preset
from mtc.training import Trainer

BACKENDS = {
    "mtc": ("sparse", "float32"),
    "mtc-torch": ("sparse", "float32"),  # whoever starts this worker sets MTC_NATIVE=0
    "mtc-dense": ("dense", "float32"),
    "mtc-bf16": ("sparse", "bfloat16"),
}
"""Backend and precision of each contender."""
PRODUCT = "product"


def make(name: str, work: Work, x: Tensor, y: Tensor) -> Peer:
    """The named contender on the device of x [rows, d_source], y [rows, d_target], which it is initialised from."""
    if name == PRODUCT:
        return Product(work, x)
    if name in BACKENDS:
        return Ours(work, x, y, *BACKENDS[name])
    raise ValueError(f"no contender {name!r}; there are {(PRODUCT, *BACKENDS)}")


class Product:
    """x [batch, d_source] times [d_source, features] in float32, into memory allocated beforehand."""

    nested = False

    def __init__(self, work: Work, x: Tensor) -> None:
        self._weight = torch.randn(work.d_source, work.features, device=x.device)
        self._out = torch.zeros(work.batch, work.features, device=x.device)

    def step(self, x: Tensor, y: Tensor) -> None:
        torch.mm(x, self._weight, out=self._out)

    def force_dead(self, features: int) -> None:
        raise NotImplementedError("a product has no features that die")

    def export(self) -> dict[str, Tensor]:
        raise NotImplementedError("a product learns nothing")


class Ours:
    """`Trainer.step` on raw activations, and its metrics as often as a run writes them down.

    The reference preset, so that sources are normalised per token (rms); all that Work names is set to Work's.
    """

    nested = True

    def __init__(self, work: Work, x: Tensor, y: Tensor, backend: str, precision: str) -> None:
        config = _config(work, backend, precision)
        self._trainer = Trainer(config, work.d_source, work.d_target, x.device)
        self._trainer.initialise(x, y)
        self._log_every = config.cluster.log_every_steps
        self._dead_after = work.dead_after_tokens
        self._forced = slice(work.features, None)

    def step(self, x: Tensor, y: Tensor) -> None:
        if self._forced.start < self._trainer.transcoder.num_features:
            since = self._trainer.transcoder.tokens_since_fired
            since[self._forced] = self._dead_after
            self._trainer._find_dead(since >= self._dead_after)  # it looks by itself every few steps only
        result = self._trainer.step(x, y)
        if result.step % self._log_every == 0:
            result.metrics()

    def force_dead(self, features: int) -> None:
        self._forced = slice(self._trainer.transcoder.num_features - features, None)

    def export(self) -> dict[str, Tensor]:
        raise NotImplementedError("sources are normalised per token, which no W_enc holds; use the transcoder itself")


def _config(work: Work, backend: str, precision: str) -> RunConfig:
    overrides = {
        "data": {"num_tokens": work.steps * work.batch},
        "transcoder": {
            "group_sizes": work.group_sizes,
            "k": work.k,
            "dead_after_tokens": work.dead_after_tokens,
            "seed": work.seed,
        },
        "optimizer": {
            "lr": work.lr,
            "batch_tokens": work.batch,
            "warmup_steps": work.warmup_steps,
            "precision": precision,
            "backend": backend,
        },
    }
    return load_preset("gemma-2-2b-layer17", overrides)


if __name__ == "__main__":
    if sys.argv[1:] != ["worker"]:
        raise SystemExit("usage: python -m benchmarks.ours worker")
    run_worker(make)
