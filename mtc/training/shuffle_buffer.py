"""The shuffle buffer on the trainer's device: activations go in by units and come out mixed over many windows, each row
`data.replays` times."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtc.config import SiteKey
from mtc.devices import send


class Unit(NamedTuple):
    """The activations of one work unit."""

    number: int
    """Number of the work unit in the run."""
    activations: Mapping[SiteKey, Tensor]
    """[tokens, d] activations by layer and site."""
    rows: NDArray[np.int32]
    """[tokens] int32: which of the unit's tokens the rows of `activations` are; all, unless some were not finite or are
    trained already."""
    tokens: int
    """Trainable tokens that the unit has in the token store."""
    dropped: NDArray[np.int32] = np.empty(0, np.int32)
    """Numbers of the tokens whose activations are not finite; `activations` has no rows of them."""
    costs: Mapping[str, Any] = MappingProxyType({})
    """Seconds and operations that making the unit has cost, for the account of time."""
    left: NDArray[np.int32] | None = None
    """[rows] int32: times that each row is still to be trained, at least 1; None if that is as often as for every
    token."""


class Taken(NamedTuple):
    """Rows that left the shuffle buffer, with where they came from."""

    activations: Mapping[SiteKey, Tensor]
    """[rows, d] activations by layer and site."""
    units: NDArray[np.int64]
    """[rows] int64: number of the work unit that each row came from."""
    rows: NDArray[np.int32]
    """[rows] int32: which of its unit's tokens each row is."""


class ShuffleBuffer:
    """Mixes the tokens of many windows: rows go in by units and come out in random order, each row `replays` times.

    Whole units are collected into blocks of `capacity / (replays + 1)` rows or a little more. Chunk i, which rows leave
    in an order that the seed and its number decide, holds each row of the `replays` newest blocks up to block i once,
    so that a row comes again with others around it; meanwhile block i + 1 is collected. The chunk of the last block
    holds each row as often as it is left. So the units of a chunk's blocks and the number of rows that left it say
    exactly what is left: a buffer that gets the same units again goes on where another one was.

    A row's repeats lie far apart: half of each block comes in the first half of a chunk, the other in the second, and
    in the last chunk a row that is left n times comes once in each nth of it. Between two of them lies, in rows, at
    least the fourth part of a block, in the middle of a run half a chunk, and `replays` blocks on average.

    Rows lie on `device`; the order is made on the host, so it is the same on every device and never waits.
    """

    def __init__(self, capacity: int, seed: Sequence[int], device: torch.device | str = "cpu", replays: int = 1):
        self.block_rows = max(1, capacity // (replays + 1))
        self.seed = tuple(seed)
        self.device = torch.device(device)
        self.replays = replays
        self.available = 0
        """Rows that can be taken from the buffer now, repeats included."""
        self._blocks: list[_Block] = []
        """Complete blocks that chunks still need, oldest first."""
        self._collecting = _Block(0, replays)
        self._ahead: Unit | None = None
        """The first unit after the newest block, which waits for the memory of one that is used up."""
        self._chunk = 0
        """Number of the chunk that rows leave at present."""
        self._taken = 0
        self._order: NDArray[np.int64] | None = None
        """Places in the present chunk's blocks, laid one after another, in the order in which their rows leave."""
        self._last: int | None = None
        """Number of the last chunk, once nothing more comes."""
        self._resume: tuple[list[int], int] = ([], 0)
        self._free: list[dict[SiteKey, Tensor]] = []
        self._no_rows: dict[SiteKey, Tensor] = {}

    def restore(self, chunk: int, units: Sequence[int], taken: int, size: int) -> None:
        """Continue within chunk `chunk`, of which `taken` rows left another buffer; `units`, which have `size` rows,
        are added next, in order."""
        self._collecting = _Block(max(0, chunk - self.replays + 1), self.replays)
        self._chunk, self._taken = chunk, taken
        self._resume = (list(units), size)

    def add(self, unit: Unit) -> None:
        """Copy in the rows of a unit."""
        self._no_rows = self._no_rows or {key: rows[:0].to(self.device) for key, rows in unit.activations.items()}
        self._store_ahead()
        if self.replays > 1 and self._full and len(unit.rows):  # that more follows is known before the chunk begins
            self._complete()
            self._ahead = unit
            return
        self._store(unit)
        if self.replays == 1 and self._full:
            self._complete()

    def close(self) -> None:
        """Make a block of what is collected, since nothing more comes.

        Raises RuntimeError if it should continue others that had other units.
        """
        self._store_ahead()
        if self._collecting.size or self._resume[0]:
            self._last = self._collecting.index
            self._complete()

    @property
    def filled(self) -> bool:
        """Whether as large a part of the next block is collected as has left of the present chunk."""
        return self.available + self.replays * self._collecting.size >= self.replays * self.block_rows

    def take(self, rows: int) -> Taken:
        """Remove and return the next `rows` rows; raises ValueError if fewer are available."""
        if rows > self.available:
            raise ValueError(f"{rows} rows were asked of a shuffle buffer that has {self.available} to give")
        parts: list[Taken] = []
        places: list[NDArray[np.int64]] = []
        done = 0
        while done < rows:
            order = self._present_order()
            chosen = order[self._taken : self._taken + rows - done]
            for place, part in self._gather(chosen):
                places.append(done + place)
                parts.append(part)
            done += len(chosen)
            self._taken += len(chosen)
            if self._taken == len(order):
                self._next_chunk()
        self.available -= rows
        if not parts:
            return Taken(self._no_rows, np.empty(0, np.int64), np.empty(0, np.int32))
        if len(parts) == 1:
            return parts[0]
        sorting = np.argsort(np.concatenate(places))
        index = send(torch.from_numpy(sorting), self.device)
        return Taken(
            {key: torch.cat([part.activations[key] for part in parts])[index] for key in self._no_rows},
            np.concatenate([part.units for part in parts])[sorting],
            np.concatenate([part.rows for part in parts])[sorting],
        )

    def position(self) -> tuple[int, list[int], int, int]:
        """The chunk that rows leave at present, the units of its blocks of which rows have left, how many rows left the
        chunk, and how many those units have: what `restore` takes."""
        begun = self._begun()
        units = [unit for block in begun for unit in block.units]
        return self._chunk, units, self._taken, sum(block.size for block in begun)

    def left(self) -> dict[int, NDArray[np.int32]]:
        """What has not left yet of the units that `position` names: for each the numbers of its rows, each as often as
        it is still to leave, ascending."""
        begun = self._begun()
        if not begun:
            return {}
        left = np.concatenate([block.left(self._chunk) for block in begun])
        if self._taken:
            left -= np.bincount(self._present_order()[: self._taken], minlength=len(left))
        found: dict[int, NDArray[np.int32]] = {}
        for block in begun:
            mine, left = np.split(left, [block.size])
            owner, rows = block.labels()
            ends = np.searchsorted(np.repeat(owner, mine), np.arange(len(block.units)), side="right")
            found |= zip(block.units, np.split(np.repeat(rows, mine), ends)[:-1], strict=True)
        return found

    def peek(self, most: int | None = None) -> dict[SiteKey, Tensor]:
        """The rows of the first blocks, as many as a chunk has or `most`, unmixed and not removed; empty if no unit
        came."""
        parts, wanted = [], sys.maxsize if most is None else most
        for block in [*self._blocks, self._collecting][: self.replays]:
            if block.memory:
                parts.append({key: memory[: min(block.size, wanted)] for key, memory in block.memory.items()})
                wanted = max(wanted - block.size, 0)
        if len(parts) < 2:
            return parts[0] if parts else {}
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @property
    def _full(self) -> bool:
        return self._collecting.size >= self.block_rows

    def _store(self, unit: Unit) -> None:
        if not self._collecting.memory and self._free:
            self._collecting.memory = self._free.pop()
        self._collecting.add(unit, self.block_rows, self.device)

    def _store_ahead(self) -> None:
        if self._ahead is not None:
            self._store(self._ahead)
            self._ahead = None

    def _complete(self) -> None:
        """Make a block of what is collected, and the chunk that it completes available."""
        block = self._collecting
        self._blocks.append(block)
        self._collecting = _Block(block.index + 1, self.replays)
        if block.index >= self._chunk and block.size:
            self.available += int(self._times(block.index).sum()) - (self._taken if block.index == self._chunk else 0)
        units, size = self._resume
        if units and (block.index == self._chunk - (not self._taken) or block.index == self._last):
            _, came, _, rows = self.position()
            if (came, rows) != (units, size):
                raise RuntimeError(
                    f"the stream began with the work units {came} of {rows} tokens, the checkpoint is within {units} "
                    f"of {size}; another number of trainers can continue it"
                )
            self._resume = ([], 0)

    def _next_chunk(self) -> None:
        over = self._chunk
        self._chunk, self._taken, self._order = over + 1, 0, None
        while self._blocks and (self._blocks[0].index <= over + 1 - self.replays or over == self._last):
            self._free.append(self._blocks.pop(0).memory)

    def _blocks_of(self, chunk: int) -> list[_Block]:
        return [block for block in self._blocks if chunk - self.replays < block.index <= chunk]

    def _begun(self) -> list[_Block]:
        """The blocks of the present chunk of which rows have left, in it or before."""
        return [block for block in self._blocks_of(self._chunk) if self._taken or block.index < self._chunk]

    def _times(self, chunk: int) -> NDArray[np.int64]:
        """[rows of the chunk's blocks] int64: how often each is in the chunk."""
        left = np.concatenate([block.left(chunk) for block in self._blocks_of(chunk)])
        return left if chunk == self._last else np.minimum(left, 1)

    def _present_order(self) -> NDArray[np.int64]:
        if self._order is None:
            rng = np.random.default_rng([*self.seed, self._chunk])
            times = self._times(self._chunk)
            if self.replays == 1:
                self._order = rng.permutation(len(times))
            else:
                rows = np.repeat(np.arange(len(times)), times)
                turn = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)  # 0, 1, ... of each row
                half = np.concatenate([np.arange(block.size) % 2 for block in self._blocks_of(self._chunk)])[rows]
                place = (turn + (half + rng.random(len(rows))) / 2) / times[rows]  # in the chunk, from 0 to 1
                self._order = rows[np.argsort(place, kind="stable")]
        return self._order

    def _gather(self, chosen: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Taken]]:
        """Rows at places of the present chunk's blocks, by block: where in `chosen` they stand, and they."""
        start = 0
        for block in self._blocks_of(self._chunk):
            place = np.flatnonzero((start <= chosen) & (chosen < start + block.size))
            if len(place):
                yield place, block.take(chosen[place] - start, self.device)
            start += block.size


class _Block:
    """Rows of consecutive units that take part in the same chunks."""

    def __init__(self, index: int, replays: int):
        self.index = index
        self.units: list[int] = []
        self.memory: dict[SiteKey, Tensor] = {}
        """[room for rows, d] by layer and site, of which the first `size` rows are in use."""
        self.size = 0
        self._replays = replays
        self._rows: list[NDArray[np.int32]] = []
        self._times: list[NDArray[np.int32]] = []
        self._labels: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None

    def add(self, unit: Unit, room: int, device: torch.device) -> None:
        need = self.size + len(unit.rows)
        if not self.memory or need > self._room():
            self._grow(unit.activations, max(need, room + unit.tokens), device)
        for key, rows in unit.activations.items():
            self.memory[key][self.size : need] = rows
        self.units.append(unit.number)
        self._rows.append(unit.rows)
        self._times.append(np.full(len(unit.rows), self._replays, np.int32) if unit.left is None else unit.left)
        self.size = need

    def left(self, chunk: int) -> NDArray[np.int64]:
        """[size] int64: times that each row is to be trained from chunk `chunk` on."""
        return np.maximum(np.concatenate(self._times).astype(np.int64) - (chunk - self.index), 0)

    def labels(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """[size] each: the place of a row's unit in `units`, and the row's number in it."""
        if self._labels is None:
            counts = [len(rows) for rows in self._rows]
            owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            self._labels = owner, np.concatenate([*self._rows, np.empty(0, np.int32)])
        return self._labels

    def take(self, chosen: NDArray[np.int64], device: torch.device) -> Taken:
        """The rows at these places."""
        owner, numbers = self.labels()
        index = send(torch.from_numpy(chosen), device)
        activations = {key: memory[index] for key, memory in self.memory.items()}
        return Taken(activations, np.array(self.units, np.int64)[owner[chosen]], numbers[chosen])

    def _room(self) -> int:
        """Rows that fit into the chunk's memory."""
        return min((len(memory) for memory in self.memory.values()), default=0)

    def _grow(self, like: Mapping[SiteKey, Tensor], rows: int, device: torch.device) -> None:
        for key, part in like.items():
            larger = torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=device)
            if key in self.memory:
                larger[: self.size] = self.memory[key][: self.size]
            self.memory[key] = larger
