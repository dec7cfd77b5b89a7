"""torch.distributed as this package uses it, and how long the ranks waited for each other.

In a single process every function does nothing, so the same code runs with and without other ranks; `alone` makes one
rank of several such a process for a while. Tensors travel between the devices that they are on; what hosts agree on
stays on hosts, where no one waits for a GPU.
"""

# Without `annotations` from __future__: DDP compares those of a hook with its types.
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from mtc import devices


class Waits:
    """Adds up spans between two marks: on a CPU of the clock, on a GPU of the device's own time."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self, device: torch.device) -> Any:
        """A mark of this moment: the clock's time, on a GPU an event."""
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def add(self, start: Any, end: Any) -> None:
        if isinstance(start, float):
            self._seconds += end - start
        else:
            self._open.append((start, end))

    def seconds(self) -> float:
        """Seconds of all spans so far; waits for the device where the spans are its own."""
        for start, end in self._open:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._open.clear()
        return self._seconds


waits = Waits()
"""What this process waited for other ranks: in `all_reduce`, in `Averaging.backward` after this rank's own gradients
were ready, and where rows are exchanged."""


_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """What this process does here is no other rank's business: there is one rank, in all of the process's threads. For
    a transcoder that a single rank trains on whole batches."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def distributed() -> bool:
    return not _is_alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor in place over all ranks; does nothing in a single process."""
    if distributed():
        start = waits.mark(tensor.device)
        dist.all_reduce(tensor, op)
        waits.add(start, waits.mark(tensor.device))


def agree(*numbers: float, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
    """Numbers of the host, reduced over all ranks in float64; no GPU is waited for."""
    values = torch.tensor(numbers, dtype=torch.float64)
    all_reduce(values, op)
    return values.tolist()


def broadcast(*objects: Any) -> list[Any]:
    """Rank 0's objects on all ranks, from host to host: small ones, as pickles."""
    shared = list(objects)
    if distributed():
        dist.broadcast_object_list(shared, 0, device=torch.device("cpu"))
    return shared


def gather(own: Any) -> list[Any]:
    """Every rank's object on all ranks, [ranks], from host to host: small ones, as pickles."""
    found = [own] * world_size()
    if distributed():
        dist.all_gather_object(found, own)
    return found


def backend(device: str) -> str:
    """Process group for trainers on "cpu" or "cuda": what GPUs hold goes by NCCL, what hosts agree on by gloo."""
    return "cpu:gloo,cuda:nccl" if device == "cuda" and not devices.PRETENDING else "gloo"


def all_gather(tensor: Tensor) -> Tensor:
    """A tensor [...] on each rank -> those of all ranks, [ranks, ...]."""
    if not distributed():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def copy_from_first(tensor: Tensor) -> None:
    """Make a tensor on every rank, in place, what it is on rank 0."""
    if distributed():
        dist.broadcast(tensor, 0)


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum of all ranks' tensors, where every rank goes on to compute the same loss from it; each rank's part gets
    the gradient of the sum."""
    return _Sum.apply(part) if distributed() else part


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Averaging:
    """A module whose gradients are averaged over ranks, unless each has weights of its own (`average=False`);
    `backward` runs a loss backwards and counts the waiting."""

    def __init__(self, module: nn.Module, device: torch.device, average: bool = True):
        self.module = module
        self._device = device
        self._last_ready: Any = None
        if average and distributed():
            # Buffers are reduced by meaning elsewhere; broadcasting rank 0's would lose the other ranks' counts. They
            # are once, here, where a new module's are the same on all ranks.
            wrapped = DistributedDataParallel(module, forward_sync_buffers=False)
            wrapped.register_comm_hook(self, _average)
            self.module = wrapped

    def backward(self, loss: Tensor) -> None:
        self._last_ready = None
        loss.backward()
        if self._last_ready is not None:
            waits.add(self._last_ready, waits.mark(self._device))

    def ready(self) -> None:
        """Called when the gradients of one more bucket are computed here."""
        self._last_ready = waits.mark(self._device)


def _average(state: Averaging, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's own reduction, with a mark before it."""
    state.ready()
    buffer = bucket.buffer().div_(dist.get_world_size())
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
