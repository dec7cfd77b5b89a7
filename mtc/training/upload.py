"""Work units on their way to the trainer's device, copied while it computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtc.config import SiteKey
from mtc.devices import current_stream, is_gpu, on_stream, pinned, record, side_stream, used_on
from mtc.training.shuffle_buffer import Unit


@contextmanager
def on_device(units: Iterator[Unit], device: torch.device, ahead: int = 1) -> Iterator[Iterator[Unit]]:
    """The units in their order with their rows on `device`, of which `ahead` are on their way while one is used.

    On a CPU the units themselves, uncopied. For a GPU a thread copies them into pinned memory and from there, on a
    stream of its own, to the device; it ends with the context.
    """
    if not is_gpu(device):
        yield units
        return
    upload = Upload(units, device, ahead)
    try:
        yield upload
    finally:
        upload.close()


class Upload:
    """Iterator over units whose copies run on a side stream, until it is closed."""

    def __init__(self, units: Iterator[Unit], device: torch.device, ahead: int):
        self._device = device
        self._stream = side_stream(device)
        self._ready: queue.Queue[tuple[Unit, Any] | BaseException | None] = queue.Queue(ahead)
        self._slots: list[tuple[dict[SiteKey, Tensor], Any]] = [({}, None) for _ in range(2)]
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(units,), daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether the next unit is on its way already, so that asking for it does not wait."""
        return not self._ready.empty()

    def __iter__(self) -> Iterator[Unit]:
        return self

    def __next__(self) -> Unit:
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        unit, copied = item
        current = current_stream(self._device)
        current.wait_event(copied)
        for rows in unit.activations.values():
            used_on(rows, current)  # its memory was taken on the side stream
        return unit

    def close(self) -> None:
        """Let the thread that copies end."""
        self._closed.set()

    def _run(self, units: Iterator[Unit]) -> None:
        try:
            for turn, unit in enumerate(units):
                if not self._put(self._upload(unit, turn % len(self._slots))):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _upload(self, unit: Unit, slot: int) -> tuple[Unit, Any]:
        staged, used = self._slots[slot]
        if used is not None:
            used.synchronize()  # the copy from this pinned memory is over
        if any(key not in staged or len(staged[key]) < rows.numel() for key, rows in unit.activations.items()):
            staged = {key: pinned((rows.numel(),), rows.dtype) for key, rows in unit.activations.items()}
        activations = {}
        with on_stream(self._stream):
            for key, rows in unit.activations.items():
                source = staged[key][: rows.numel()].view_as(rows).copy_(rows)
                activations[key] = source.to(self._device, non_blocking=True, copy=True)
            copied = record(self._stream)
        self._slots[slot] = (staged, copied)
        return unit._replace(activations=activations), copied

    def _put(self, item: tuple[Unit, Any] | BaseException | None) -> bool:
        """Hand a unit on; False if the consumer is gone."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=1.0)
                return True
            except queue.Full:
                continue
        return False
