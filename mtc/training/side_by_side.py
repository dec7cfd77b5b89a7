"""Steps of several transcoders on one batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import Tensor

from mtc.devices import is_gpu
from mtc.training.trainer import StepResult, Trainer
from mtc.transcoder import world_size


class SideBySide:
    """Trainers that step on the same batches, each as it would alone.

    On a CPU they step at the same time, each with its share of the threads: a transcoder's step is too short to keep
    many busy. What it computes does not depend on the number of threads, but for the rounding of matrix products whose
    result is small: the gradient of W_skip, and those of the dense backend. Where other ranks train them too, they step
    in turn, since all ranks must meet in the same order; so they do on a GPU, which the host runs ahead of.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = trainers
        self._threads = torch.get_num_threads()
        workers = min(len(trainers), self._threads)
        self._share = self._threads // workers
        self._pool: ThreadPoolExecutor | None = None
        if workers > 1 and world_size() == 1 and not any(is_gpu(trainer.device) for trainer in trainers):
            self._pool = ThreadPoolExecutor(workers, "step", lambda: torch.set_num_threads(self._share))

    def step(self, rows: Sequence[tuple[Tensor, Tensor]], global_tokens: int) -> list[StepResult]:
        """One step of every trainer on its source and target, as Trainer.step takes them."""
        steps = [
            partial(trainer.step, source, target, global_tokens)
            for trainer, (source, target) in zip(self.trainers, rows, strict=True)
        ]
        if self._pool is None:
            return [step() for step in steps]
        try:
            if any(trainer.compute is None for trainer in self.trainers):  # they measure how to compute, undisturbed
                torch.set_num_threads(self._share)
                return [step() for step in steps]
            running = [self._pool.submit(step) for step in steps]
            wait(running)  # an error leaves none of them at work
            return [step.result() for step in running]
        finally:
            torch.set_num_threads(self._threads)  # also what threads to come begin with, which the pool's have changed
