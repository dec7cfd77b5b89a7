"""Batches of one size, whatever each rank has at hand: all ranks agree on their shares of every step.

Imported by trainers only: the processes that coordinate them do without torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.blocks import ActorCosts
from mtc.config import SiteKey
from mtc.devices import synchronise
from mtc.storage import Ledger
from mtc.training import Clock, ShuffleBuffer, Unit, Upload
from mtc.transcoder import all_gather, waits, world_size
from mtc.transcoder.distributed import distributed


class Share(NamedTuple):
    """What the ranks agreed on for one step."""

    rows: int
    """Rows of this rank's share of the global batch."""
    tokens: int
    """Rows of the global batch, over all ranks."""
    of_ranks: tuple[int, ...]
    """Rows of every rank's share."""
    save: bool
    """Whether rank 0 wants a checkpoint before the step."""


class Batches:
    """From the stream through the shuffle buffer to batches that all ranks agree on.

    A global batch has the same size whatever the number of ranks. Where one has too little left, the others give more,
    so every token of the training units is trained on, and the last step takes what remains.
    """

    def __init__(
        self,
        units: Iterator[Unit],
        buffer: ShuffleBuffer,
        batch: int,
        ledger: Ledger,
        clock: Clock,
        num_training: int,
        filters: Mapping[int, NDArray[np.int32]] = MappingProxyType({}),
    ):
        self.units, self.buffer, self.batch, self.ledger = units, buffer, batch, ledger
        self.clock = clock
        self.num_training = num_training
        """Number of the first unit that is for calibration; those before are for training."""
        self.filters = dict(filters)
        """Rows that are left of units which were trained in part on other trainers, by unit, each as often as it is."""
        self.costs = ActorCosts()
        """What the model actors spent on all units that this rank received but the first."""
        self.tokens = 0
        """Tokens taken by all ranks for steps, repeats included."""
        self.own_tokens = 0
        """Tokens taken by this rank for steps."""
        self.calibrated = 0
        """Tokens given to this rank for calibration."""
        self.startup_seconds = 0.0
        """Seconds from the start of this rank until its first unit arrived."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._held: Unit | None = None
        self._ended = False

    def agree(self, last: bool, save: bool = False) -> Share | None:
        """Fill the buffer for one more step; None when nothing is left. Called on all ranks at once.

        `last` asks for everything that is left if that is less than two batches, `save` is rank 0's wish.
        """
        ranks, rank = world_size(), dist.get_rank() if distributed() else 0
        equal = [self.batch // ranks + (i < self.batch % ranks) for i in range(ranks)]
        wanted = 2 * self.batch if last else equal[rank]
        while True:
            self._fill(wanted)
            states = self._gather(self.buffer.available, self._ended, save)
            rows = [state[0] for state in states]
            ended = all(state[1] for state in states)
            if ended or sum(rows) >= (2 * self.batch if last else self.batch):
                break
            wanted = self.buffer.available + self.batch
        total = sum(rows) if sum(rows) < (2 * self.batch if last else self.batch) else self.batch
        if not total:
            return None
        shares = rows if total == sum(rows) else _shares(equal, rows)
        return Share(shares[rank], total, tuple(shares), bool(states[0][2]))

    def take(self, share: Share) -> Mapping[SiteKey, torch.Tensor]:
        """This rank's rows of the step by layer and site, [rows, d]; empty if no unit ever came."""
        self.tokens += share.tokens
        self.own_tokens += share.rows
        with self.clock.part("transport"):
            taken = self.buffer.take(share.rows)
            self.ledger.train(taken.units, taken.rows)
            return taken.activations

    def calibration(self) -> Iterator[Unit]:
        """What comes after the training units; not the same number on all ranks. Raises RuntimeError for another."""
        while self._held is not None:
            if self._held.number < self.num_training:
                raise RuntimeError(f"work unit {self._held.number} came after the end of the training units")
            self.calibrated += len(self._held.rows)
            yield self._held
            self._held = self._next()

    def _fill(self, rows: float) -> None:
        """Take in units until `rows` can be taken and the buffer is filled, or the training units end."""
        while not self._ended and (self.buffer.available < rows or not self.buffer.filled):
            unit = self._next()
            if unit is None or unit.number >= self.num_training:
                self._held, self._ended = unit, True
                self.buffer.close()
                return
            with self.clock.part("transport"):
                self.ledger.receive(unit.number, unit.tokens, unit.dropped)
                if unit.number in self.filters:
                    unit = _only(unit, self.filters[unit.number])
                self.buffer.add(unit)

    def _next(self) -> Unit | None:
        if isinstance(self.units, Upload) and not self.units.ready:
            self._finish_steps()
        with self.clock.part("waiting"):
            unit = next(self.units, None)
        if unit is not None and self.startup_seconds:
            self.costs.add(unit)
        elif unit is not None:
            self.startup_seconds = time.perf_counter() - self._started
            self.clock.reset()
        return unit

    def _gather(self, *state: int) -> list[list[int]]:
        """The numbers of every rank, put together."""
        if not distributed():
            return [list(state)]
        with self.clock.part("all_reduce"):
            return all_gather(torch.tensor(state)).tolist()

    def settle_waits(self) -> None:
        """Count as `all_reduce` what ranks waited for each other inside their steps; on a GPU this waits for the
        device."""
        with self.clock.part("step"):
            waited = waits.seconds()
        self.clock.move("step", "all_reduce", waited - self._waited)
        self._waited = waited

    def _finish_steps(self) -> None:
        """Wait for the steps that a GPU still computes before the host has to wait anyway: that belongs to training,
        not to the waiting."""
        with self.clock.part("step"):
            synchronise(self.buffer.device)


def _shares(equal: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Rows of each rank in a batch: equal shares where the ranks have enough rows; what some lack, the first others
    give."""
    shares = [min(wanted, have) for wanted, have in zip(equal, rows, strict=True)]
    missing = sum(equal) - sum(shares)
    for rank, have in enumerate(rows):
        more = min(missing, have - shares[rank])
        shares[rank] += more
        missing -= more
    return shares


def _only(unit: Unit, rows: NDArray[np.int32]) -> Unit:
    """A unit with only some of its rows, each to be trained as often as `rows` names it."""
    left = np.bincount(rows, minlength=unit.tokens)[unit.rows].astype(np.int32)
    kept = left > 0
    chosen = torch.from_numpy(np.flatnonzero(kept))
    activations = {key: part[chosen.to(part.device)] for key, part in unit.activations.items()}
    return unit._replace(activations=activations, rows=unit.rows[kept], left=left[kept])
