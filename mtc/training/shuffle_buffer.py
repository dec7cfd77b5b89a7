"""The shuffle buffer on the trainer's device: activations go in by units and come out mixed over many windows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
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


class Taken(NamedTuple):
    """Rows that left the shuffle buffer, with where they came from."""

    activations: Mapping[SiteKey, Tensor]
    """[rows, d] activations by layer and site."""
    units: NDArray[np.int64]
    """[rows] int64: number of the work unit that each row came from."""
    rows: NDArray[np.int32]
    """[rows] int32: which of its unit's tokens each row is."""


class ShuffleBuffer:
    """Mixes the tokens of many windows: rows go in by units and come out in random order, each row once.

    Whole units are collected into chunks of half the capacity or a little more. A chunk that is complete comes out in
    an order that the seed and the chunk's number decide, while the next one is collected. So the units of a chunk and
    the number of rows that left it say exactly which rows are left: a buffer that gets the same units again goes on
    where another one was.

    Rows lie on `device`; the order is made on the host, so it is the same on every device and never waits.
    """

    def __init__(self, capacity: int, seed: Sequence[int], device: torch.device | str = "cpu"):
        self.chunk_rows = max(1, capacity // 2)
        self.seed = tuple(seed)
        self.device = torch.device(device)
        self._complete: deque[_Chunk] = deque()
        self._free: list[dict[SiteKey, Tensor]] = []
        self._resume: tuple[list[int], int, int] = ([], 0, 0)
        self._collecting = _Chunk(0)
        self._no_rows: dict[SiteKey, Tensor] = {}

    def restore(self, index: int, units: Sequence[int], taken: int, size: int) -> None:
        """Continue with chunk `index`, of whose `size` rows `taken` left another buffer; `units` are added next, in
        order."""
        self._collecting = _Chunk(index)
        self._resume = (list(units), taken, size)

    def add(self, unit: Unit) -> None:
        """Copy in the rows of a unit."""
        chunk = self._collecting
        self._no_rows = self._no_rows or {key: rows[:0].to(self.device) for key, rows in unit.activations.items()}
        if not chunk.memory and self._free:
            chunk.memory = self._free.pop()
        chunk.add(unit, self.chunk_rows, self.device)
        if chunk.size >= self.chunk_rows:
            self.close()

    def close(self) -> None:
        """Make a chunk of what is collected, because it is large enough or because nothing more comes.

        Raises RuntimeError if it should continue one that had other units.
        """
        chunk = self._collecting
        units, taken, size = self._resume
        if units and (chunk.units, chunk.size) != (units, size):
            raise RuntimeError(
                f"the stream began with the work units {chunk.units} of {chunk.size} tokens, the checkpoint is within "
                f"{units} of {size}; another number of trainers can continue it"
            )
        if not chunk.size and not units:
            return
        self._resume = ([], 0, 0)
        self._collecting = _Chunk(chunk.index + 1)
        chunk.order = np.random.default_rng([*self.seed, chunk.index]).permutation(chunk.size)
        chunk.taken = taken
        if chunk.left:
            self._complete.append(chunk)

    @property
    def available(self) -> int:
        """Rows that can be taken from the buffer now."""
        return sum(chunk.left for chunk in self._complete)

    @property
    def size(self) -> int:
        """Rows that the buffer holds: those that can be taken and those that are being collected."""
        return self.available + self._collecting.size

    def take(self, rows: int) -> Taken:
        """Remove and return the next `rows` rows; raises ValueError if fewer are available."""
        if rows > self.available:
            raise ValueError(f"{rows} rows were asked of a shuffle buffer that has {self.available} to give")
        parts = []
        missing = rows
        while missing:
            chunk = self._complete[0]
            part = chunk.take(min(missing, chunk.left), self.device)
            missing -= len(part.rows)
            parts.append(part)
            if not chunk.left:
                self._free.append(chunk.memory)
                self._complete.popleft()
        if not parts:
            return Taken(self._no_rows, np.empty(0, np.int64), np.empty(0, np.int32))
        if len(parts) == 1:
            return parts[0]
        together = {key: torch.cat([part.activations[key] for part in parts]) for key in self._no_rows}
        return Taken(
            together, np.concatenate([part.units for part in parts]), np.concatenate([part.rows for part in parts])
        )

    def position(self) -> tuple[int, list[int], int, int]:
        """The chunk that rows leave at present, its units, how many rows left it and how many it had: what `restore`
        takes."""
        chunk = self._complete[0] if self._complete else self._collecting
        return (chunk.index, chunk.units, chunk.taken, chunk.size) if chunk.taken else (chunk.index, [], 0, 0)

    def left(self) -> dict[int, NDArray[np.int32]]:
        """The rows that have not left yet of each unit in the chunk that rows leave at present."""
        if not self._complete or not self._complete[0].taken:
            return {}
        chunk = self._complete[0]
        owner, rows = chunk.labels()
        assert chunk.order is not None
        rest = np.sort(chunk.order[chunk.taken :])  # units lie one after another, their rows in order
        ends = np.searchsorted(owner[rest], np.arange(len(chunk.units)), side="right")
        return dict(zip(chunk.units, np.split(rows[rest], ends)[:-1], strict=True))

    def peek(self) -> dict[SiteKey, Tensor]:
        """The rows of the first chunk, unmixed and not removed; empty if no unit came."""
        chunk = self._complete[0] if self._complete else self._collecting
        return {key: memory[: chunk.size] for key, memory in chunk.memory.items()}


class _Chunk:
    """Rows of consecutive units that are mixed together."""

    def __init__(self, index: int):
        self.index = index
        self.units: list[int] = []
        self.memory: dict[SiteKey, Tensor] = {}
        """[room for rows, d] by layer and site, of which the first `size` rows are in use."""
        self.size = 0
        self.order: NDArray[np.int64] | None = None
        self.taken = 0
        self._rows: list[NDArray[np.int32]] = []
        self._labels: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None

    @property
    def left(self) -> int:
        return self.size - self.taken

    def add(self, unit: Unit, room: int, device: torch.device) -> None:
        need = self.size + len(unit.rows)
        if not self.memory or need > self._room():
            self._grow(unit.activations, max(need, room + unit.tokens), device)
        for key, rows in unit.activations.items():
            self.memory[key][self.size : need] = rows
        self.units.append(unit.number)
        self._rows.append(unit.rows)
        self.size = need

    def labels(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """[size] each: the place of a row's unit in `units`, and the row's number in it."""
        if self._labels is None:
            counts = [len(rows) for rows in self._rows]
            owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
            self._labels = owner, np.concatenate([*self._rows, np.empty(0, np.int32)])
        return self._labels

    def take(self, rows: int, device: torch.device) -> Taken:
        assert self.order is not None
        chosen = self.order[self.taken : self.taken + rows]
        self.taken += rows
        owner, numbers = self.labels()
        index = send(torch.from_numpy(chosen), device)
        activations = {key: memory[index] for key, memory in self.memory.items()}
        return Taken(activations, np.array(self.units, np.int64)[owner[chosen]], numbers[chosen])

    def _room(self) -> int:
        """Rows that fit into the chunk's memory."""
        return min((len(memory) for memory in self.memory.values()), default=0)

    def _grow(self, like: Mapping[SiteKey, Tensor], rows: int, device: torch.device) -> None:
        old = self.memory
        self.memory = {
            key: torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=device) for key, part in like.items()
        }
        for key, before in old.items():
            self.memory[key][: self.size] = before[: self.size]
