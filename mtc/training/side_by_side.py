"""Steps of several transcoders on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from mtc.training.trainer import StepResult, Trainer
from mtc.transcoder import world_size


class SideBySide:
    """Trainers that step on the same batches, each as it would alone.

    On a CPU with several threads each takes one of them: a transcoder's step is too short to share them well. Where
    other ranks train too, trainers step in turn, since all ranks must meet in the same order; so they do on a GPU,
    which the host runs ahead of.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = trainers
        workers = min(len(trainers), torch.get_num_threads())
        self._pool: ThreadPoolExecutor | None = None
        if workers > 1 and world_size() == 1 and all(trainer.device.type == "cpu" for trainer in trainers):
            self._pool = ThreadPoolExecutor(workers, "step", lambda: torch.set_num_threads(1))

    def step(self, rows: Sequence[tuple[Tensor, Tensor]], global_tokens: int) -> list[StepResult]:
        """One step of every trainer on its source and target, as Trainer.step takes them."""
        steps = [
            partial(trainer.step, source, target, global_tokens)
            for trainer, (source, target) in zip(self.trainers, rows, strict=True)
        ]
        in_turn = any(trainer.compute is None for trainer in self.trainers)  # which measures how to compute
        if self._pool is None or in_turn:
            return [step() for step in steps]
        return [done.result() for done in [self._pool.submit(step) for step in steps]]
