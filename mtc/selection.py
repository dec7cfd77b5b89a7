"""BatchTopK over the global batch: exactly the k * B largest positive pre-activations of all ranks together.

Bussmann et al. 2024, arXiv:2412.06410, there for one process. No sort: positive floats order like their bit patterns,
so the border is found by counting. Ties at the border go by rank, then position. One rank with a batch and several
with its parts therefore choose the same entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtc import native
from mtc.distributed import all_gather, all_reduce, distributed

GUESS = 0.9
"""Share of an earlier border above which entries are listed first."""


class Chosen(NamedTuple):
    """Entries of a matrix [tokens, features], ordered by token, then feature."""

    token: Tensor
    """[entries] int64"""
    feature: Tensor
    """[entries] int64"""
    value: Tensor
    """[entries]"""


def largest_entries(z: Tensor, count: int, border: float = 0.0) -> tuple[Chosen, float]:
    """The `count` largest positive entries of all ranks' z [tokens, features], this rank's part; fewer if there are.

    `border` is a guess at the smallest of them that saves time on a CPU and never changes the result; the true one is
    returned. On a GPU, in one process, nothing waits for the host: the entries are always `count`, the last ones of
    value 0 if fewer are positive, and the border returned is 0.
    """
    return (_largest_cuda(z, count), 0.0) if z.is_cuda else _largest_cpu(z, count, border)


def _largest_cpu(z: Tensor, count: int, border: float) -> tuple[Chosen, float]:
    for floor in (GUESS * border, 0.0):
        found = _list_above(z, floor)
        keep, smallest = keep_largest(found.value.float(), count)
        if floor == 0 or smallest > 0:  # otherwise the guess was too high, on all ranks together
            break
    kept = keep.nonzero().squeeze(1)
    return Chosen(*(part[kept] for part in found)), float(smallest)


def _largest_cuda(z: Tensor, count: int) -> Chosen:
    keep, _ = keep_largest(z.flatten().float(), count)
    if distributed():  # ranks hold different numbers of entries
        index = keep.nonzero().squeeze(1)
    else:
        index = torch.nonzero_static(keep, size=min(count, keep.numel()), fill_value=keep.numel() - 1).squeeze(1)
    real = torch.arange(len(index), device=z.device) < keep.sum()
    token = index.div(z.shape[1], rounding_mode="floor")
    return Chosen(token, index - token * z.shape[1], torch.where(real, z.flatten()[index], 0.0))


def _list_above(z: Tensor, floor: float) -> Chosen:
    """All entries above `floor`."""
    if not native.runs(z):
        index = (z > floor).flatten().nonzero().squeeze(1)
        token = index.div(z.shape[1], rounding_mode="floor")
        return Chosen(token, index - token * z.shape[1], z.flatten()[index])
    counts = torch.empty(len(z), dtype=torch.int64)
    native.call("count_above", z, *z.shape, floor, counts)
    total = int(counts.sum())
    feature, value = torch.empty(total, dtype=torch.int64), torch.empty(total)
    native.call("list_above", z, *z.shape, floor, counts.cumsum(0) - counts, feature, value)
    return Chosen(torch.repeat_interleave(counts, output_size=total), feature, value)


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
    return above.logical_or_(tied.logical_and_(tied.cumsum(0, dtype=torch.int32) <= free)), border


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
    bits = torch.where(values > 0, values, 0.0).view(torch.int32)  # NaN counts as nothing, as in histograms
    border = torch.zeros((), dtype=torch.int32, device=values.device)
    for bit in range(30, -1, -1):
        trial = border | (1 << bit)
        enough = (bits >= trial).sum()
        all_reduce(enough)
        border = torch.where(enough >= count, trial, border)
    return border.view(torch.float32)
