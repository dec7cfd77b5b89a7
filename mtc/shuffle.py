"""The shuffle buffer on the trainer's device, and the way of activations to it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtc.devices import send


class Unit(NamedTuple):
    """The activations of one work unit."""

    number: int
    """Which one."""
    columns: tuple[Tensor, ...]
    """Each [tokens, d]: source and target of the first layer, of the second, ..."""
    costs: Mapping[str, Any] = MappingProxyType({})
    """What making it has cost, for the account of time."""


class ShuffleBuffer:
    """Mixes the tokens of many windows: rows go in by units and come out as random batches, each row once.

    Rows lie on `device`. The choice of rows is made on the host, so it is the same on every device and never waits.
    """

    def __init__(self, capacity: int, seed: int, device: torch.device | str = "cpu"):
        self.capacity = capacity
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.columns: tuple[Tensor, ...] = ()
        self.owner = torch.empty(0, dtype=torch.int64)
        """[rows]: the unit that each row came from; on the host."""
        self.size = 0

    def add(self, unit: Unit) -> None:
        """Copy in the rows of a unit."""
        need = self.size + len(unit.columns[0])
        if not self.columns or need > len(self.owner):
            self._grow(unit.columns, max(need, self.capacity + len(unit.columns[0])))
        for column, rows in zip(self.columns, unit.columns, strict=True):
            column[self.size : need] = rows
        self.owner[self.size : need] = unit.number
        self.size = need

    def ready(self, batch: int) -> bool:
        """Whether enough is mixed for a good batch."""
        return self.size >= max(batch, self.capacity)

    def take(self, batch: int) -> tuple[Tensor, ...]:
        """Remove and return `batch` random rows of every column; raises ValueError if there are fewer."""
        if batch > self.size:
            raise ValueError(f"{batch} rows were asked of a shuffle buffer that holds {self.size}")
        index = torch.randperm(self.size, generator=self.generator)[:batch]
        left = self.size - batch
        # Rows from the end fill the holes.
        keep = torch.ones(batch, dtype=torch.bool)
        keep[index[index >= left] - left] = False
        holes, movers = index[index < left], keep.nonzero().squeeze(1) + left
        self.owner[holes] = self.owner[movers]
        self.size = left
        index, holes, movers = (send(part, self.device) for part in (index, holes, movers))
        taken = []
        for column in self.columns:
            taken.append(column[index])
            column[holes] = column[movers]
        return tuple(taken)

    def units(self) -> set[int]:
        """Work units that still have rows here."""
        return set(self.owner[: self.size].unique().tolist())

    def peek(self) -> tuple[Tensor, ...]:
        """All rows, unmixed and not removed."""
        return tuple(column[: self.size] for column in self.columns)

    def _grow(self, like: Sequence[Tensor], rows: int) -> None:
        def larger(old: Tensor | None, new: Tensor) -> Tensor:
            if old is not None:
                new[: self.size] = old[: self.size]
            return new

        old = self.columns or (None,) * len(like)
        self.columns = tuple(
            larger(o, torch.empty((rows, *n.shape[1:]), dtype=n.dtype, device=self.device))
            for o, n in zip(old, like, strict=True)
        )
        self.owner = larger(self.owner, torch.empty(rows, dtype=torch.int64))


@contextmanager
def on_device(units: Iterator[Unit], device: torch.device, ahead: int = 1) -> Iterator[Iterator[Unit]]:
    """The same units with their rows on `device`, of which `ahead` are on their way while one is used.

    On a CPU the units themselves, uncopied. For a GPU a thread copies them into pinned memory and from there, on a
    stream of its own, to the device; it ends with the context.
    """
    if device.type != "cuda":
        yield units
        return
    upload = _Upload(units, device, ahead)
    try:
        yield upload
    finally:
        upload.close()


class _Upload:
    """Iterator over units whose copies run on a side stream, until it is closed."""

    def __init__(self, units: Iterator[Unit], device: torch.device, ahead: int):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._ready: queue.Queue[tuple[Unit, torch.cuda.Event] | BaseException | None] = queue.Queue(ahead)
        self._slots: list[tuple[list[Tensor], torch.cuda.Event | None]] = [([], None) for _ in range(2)]
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(units,), daemon=True).start()

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        unit, copied = item
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for column in unit.columns:
            column.record_stream(current)  # its memory was taken on the side stream
        return unit

    def close(self) -> None:
        """Let the thread end."""
        self._closed.set()

    def _run(self, units: Iterator[Unit]) -> None:
        try:
            for turn, unit in enumerate(units):
                if not self._put(self._upload(unit, turn % len(self._slots))):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _upload(self, unit: Unit, slot: int) -> tuple[Unit, torch.cuda.Event]:
        staged, used = self._slots[slot]
        if used is not None:
            used.synchronize()  # the copy from this pinned memory is over
        if not staged or any(len(s) < c.numel() for s, c in zip(staged, unit.columns, strict=True)):
            staged = [torch.empty(c.numel(), dtype=c.dtype, pin_memory=True) for c in unit.columns]
        columns = []
        with torch.cuda.stream(self._stream):
            for column, memory in zip(unit.columns, staged, strict=True):
                pinned = memory[: column.numel()].view_as(column)
                pinned.copy_(column)
                columns.append(pinned.to(self._device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self._stream)
        self._slots[slot] = (staged, event)
        return unit._replace(columns=tuple(columns)), event

    def _put(self, item: tuple[Unit, torch.cuda.Event] | BaseException | None) -> bool:
        """False if the consumer is gone."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=1.0)
                return True
            except queue.Full:
                continue
        return False
