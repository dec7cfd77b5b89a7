"""BatchTopK over the global batch: exactly the k * B largest positive pre-activations of all ranks together.

Bussmann et al. 2024, arXiv:2412.06410, there for one process. No sort: positive floats order like their bit patterns,
so the border is found by counting. Ties at the border go by rank, then position. One rank with a batch and several
with its parts therefore choose the same entries.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def keep_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of `values` [n], float32, are among the `count` largest positive ones of all ranks.

    Returns the mask [n] and the smallest chosen value, a scalar (0 if fewer than `count` are positive: then all of
    those are chosen). Called on every rank at once; on a GPU nothing waits for the host.
    """
    border = kth_largest(values, count)
    above = values > border
    tied = (values == border) & (border > 0)
    counts = torch.stack([above.sum(), tied.sum()])
    if not distributed() and not values.is_cuda and int(counts.sum()) <= count:
        return above.logical_or_(tied), border
    gathered = all_gather(counts)  # [ranks, 2]
    earlier = gathered[: dist.get_rank() if distributed() else 0, 1].sum()
    free = count - gathered[:, 0].sum() - earlier  # ties that are left for this rank and later ones
    return above.logical_or_(tied.logical_and_(tied.cumsum(0) <= free)), border


def kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest positive float32 of all ranks' `values`, a scalar, exactly; 0 if fewer are positive."""
    return _by_search(values, count) if values.is_cuda else _by_histogram(values, count)


def _by_histogram(values: Tensor, count: int) -> Tensor:
    """Two histograms, of the upper and of the lower 16 bits: two small all-reduces."""
    bits = values[values > 0].view(torch.int32)
    upper = torch.bincount(bits >> 16, minlength=1 << 15)
    all_reduce(upper)
    suffix = upper.flip(0).cumsum(0).flip(0)  # entries in this bin or above
    if int(suffix[0]) < count:
        return values.new_zeros(())
    high = int((suffix >= count).sum()) - 1
    rest = count - (int(suffix[high]) - int(upper[high]))
    lower = torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=1 << 16)
    all_reduce(lower)
    low = int((lower.flip(0).cumsum(0).flip(0) >= rest).sum()) - 1
    return torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32)


def _by_search(values: Tensor, count: int) -> Tensor:
    """One bit at a time, from the top, by counting: nothing waits for the host."""
    bits = values.clamp(min=0).view(torch.int32)
    border = torch.zeros((), dtype=torch.int32, device=values.device)
    for bit in range(30, -1, -1):
        trial = border | (1 << bit)
        enough = (bits >= trial).sum()
        all_reduce(enough)
        border = torch.where(enough >= count, trial, border)
    return border.view(torch.float32)


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if distributed() else 1


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce in place over all ranks; does nothing in a single process."""
    if distributed():
        dist.all_reduce(tensor, op)


def all_gather(tensor: Tensor) -> Tensor:
    """[...] on each rank -> [ranks, ...]."""
    if not distributed():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)
