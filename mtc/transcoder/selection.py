"""Which entries of a matrix [tokens, features] are chosen: the largest of all ranks together, of each row, or all above
a border.

BatchTopK takes exactly the k * B largest positive pre-activations of the global batch (Bussmann et al. 2024,
arXiv:2412.06410, there for one process). On CPUs no sort: positive floats order like their bit
patterns, so the border is found by counting. On GPUs each rank's own largest come from torch's topk, without the host.
Ties at the border go by rank, then position. One rank with a batch and several with its parts therefore choose the same
entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtc.devices import is_gpu
from mtc.transcoder import native
from mtc.transcoder.distributed import all_gather, all_reduce, distributed

GUESS = 0.9
"""Share of the last step's border above which entries are listed first."""


class Chosen(NamedTuple):
    """Chosen entries of a matrix [tokens, features], ordered by token, then feature."""

    token: Tensor
    """[entries] int64, row of each entry."""
    feature: Tensor
    """[entries] int64, column of each entry."""
    value: Tensor
    """[entries], value of each entry in the matrix's dtype."""


def largest_entries(z: Tensor, count: int, border: float = 0.0, scale: Tensor | None = None) -> tuple[Chosen, float]:
    """The `count` largest positive entries of all ranks' z [tokens, features], this rank's part; fewer if there are.

    With `scale` [features], at least 0, z * scale is what is compared and must be positive; values stay z's. `border`
    is a guess at the smallest of them that saves time on a CPU and never changes the result; the true one is returned.
    On a GPU, in one process, nothing waits for the host: the entries are always `count`, or as many as z has, some of
    value 0 if fewer are positive, and the border returned is 0.
    """
    return (_largest_gpu(z, count, scale), 0.0) if is_gpu(z.device) else _largest_cpu(z, count, border, scale)


def largest_of_each(z: Tensor, k: int, scale: Tensor | None = None, sharded: bool = False) -> Chosen:
    """The `k` largest positive entries of each row of z [tokens, features], fewer where fewer are positive.

    With `sharded` every rank has other columns of the same rows, and this is its part of the largest of all. With
    `scale`, of z's shape or [features], z * scale is what is compared and must be positive; values stay z's. On a GPU
    nothing waits for the host: rows always have `k` entries, some of value 0.
    """
    ranked = z if scale is None else z * scale
    rank, feature = ranked.topk(min(k, z.shape[1]), dim=1, sorted=False)
    feature, order = feature.sort(dim=1)
    rank = rank.gather(1, order)
    is_chosen = rank > 0
    if sharded:
        is_chosen &= among_ranks(torch.where(is_chosen, rank, -torch.inf), k)
    value = torch.where(is_chosen, z.gather(1, feature), 0.0)
    token = torch.arange(len(z), device=z.device).repeat_interleave(feature.shape[1])
    chosen = Chosen(token, feature.flatten(), value.flatten())
    return chosen if is_gpu(z.device) else Chosen(*(part[is_chosen.flatten()] for part in chosen))


def among_ranks(own: Tensor, k: int) -> Tensor:
    """[rows, n] bool: which of a rank's candidates `own` [rows, n], at most k in a row, are among the k largest of the
    same row on all ranks. Those of -inf are not; ties go by rank, then position."""
    gathered = all_gather(torch.nn.functional.pad(own, (0, k - own.shape[1]), value=-torch.inf))  # [ranks, rows, k]
    border = gathered.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]  # [rows, 1]
    above, tied = (gathered > border).sum(2), (gathered == border).sum(2)  # [ranks, rows]
    free = _free(k, above, tied).unsqueeze(1)
    is_tied = (own == border) & (border > -torch.inf)
    return (own > border) | (is_tied & (is_tied.cumsum(1) <= free))


def entries_above(z: Tensor, floor: Tensor | float) -> Chosen:
    """All entries of z [tokens, features] above `floor`, a number or one for each feature [features]; waits for the
    host on a GPU."""
    if not native.runs(z):
        index = (z > floor).flatten().nonzero().squeeze(1)
        token = index.div(z.shape[1], rounding_mode="floor")
        return Chosen(token, index - token * z.shape[1], z.flatten()[index])
    floors = floor if isinstance(floor, Tensor) else z.new_full((z.shape[1],), floor)
    counts = torch.empty(len(z), dtype=torch.int64)
    native.call("count_above", z, *z.shape, floors, counts)
    total = int(counts.sum())
    feature, value = torch.empty(total, dtype=torch.int64), torch.empty(total)
    native.call("list_above", z, *z.shape, floors, counts.cumsum(0) - counts, feature, value)
    return Chosen(torch.repeat_interleave(counts, output_size=total), feature, value)


def keep_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of `values` [n], float32, are among the `count` largest positive ones of all ranks.

    Returns the mask [n] and the smallest chosen value, a scalar (0 if fewer than `count` are positive: then all of
    those are chosen). Called on every rank at once; on a GPU nothing waits for the host.
    """
    counted = _border(_largest_values(values, count), count) if is_gpu(values.device) else None
    border = counted[0] if counted else _by_histogram(values, count)
    is_above = values > border
    is_tied = (values == border) & (border > 0)
    if counted:
        _, above, tied = counted
    else:
        counts = torch.stack([is_above.sum(), is_tied.sum()])
        if not distributed() and int(counts.sum()) <= count:
            return is_above.logical_or_(is_tied), border
        above, tied = all_gather(counts).unbind(1)
    chosen = is_tied.logical_and_(is_tied.cumsum(0, dtype=torch.int32) <= _free(count, above, tied))
    return is_above.logical_or_(chosen), border


def kth_largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest positive float32 of all ranks' `values`, a scalar, exactly; 0 if fewer are positive."""
    if is_gpu(values.device):
        return _border(_largest_values(values, count), count)[0]
    return _by_histogram(values, count)


def _largest_cpu(z: Tensor, count: int, border: float, scale: Tensor | None = None) -> tuple[Chosen, float]:
    for floor in (GUESS * border, 0.0):
        # A border of z for each feature costs no more than one for all; a scaled copy of z or of weights would. Where
        # the scale is 0 it is infinite, or 0 / 0, and nothing is above. Rounding may list too much, never too little.
        found = entries_above(z, floor if scale is None else (1 - 1e-6) * floor / scale)
        rank = found.value if scale is None else found.value * scale[found.feature]
        keep, smallest = keep_largest(rank.float(), count)
        if smallest > floor or floor == 0:  # otherwise the guess was too high, on all ranks together
            break
    kept = keep.nonzero().squeeze(1)
    return Chosen(*(part[kept] for part in found)), float(smallest)


def _largest_gpu(z: Tensor, count: int, scale: Tensor | None = None) -> Chosen:
    """The largest entries by torch's topk, which knows no order among equal values: the first ones of those at the
    border are put in."""
    ranked = torch.where(z > 0, z, 0.0)  # NaN counts as nothing
    flat = (ranked if scale is None else ranked.mul_(scale)).flatten()
    size = min(count, flat.numel())
    value, index = flat.topk(size, sorted=False)
    border, above, tied = _border(value, count)
    at_border = value == border
    # As many as topk has; where fewer are in z than are asked for, what fills up is never read.
    first = torch.nonzero_static(flat == border, size=size, fill_value=0).squeeze(1)
    place = at_border.cumsum(0) - 1
    index = torch.where(at_border, first[place.clamp(min=0)], index)
    keep = (value > border) | (at_border & (border > 0) & (place < _free(count, above, tied)))
    index, order = index.sort()
    value = torch.where(keep[order], z.flatten()[index], 0.0)
    if distributed():  # ranks hold different numbers of entries
        chosen = value > 0
        index, value = index[chosen], value[chosen]
    token = index.div(z.shape[1], rounding_mode="floor")
    return Chosen(token, index - token * z.shape[1], value)


def _free(count: int, above: Tensor, tied: Tensor) -> Tensor:
    """How many entries at the border this rank may choose; `above` and `tied` [ranks, ...] count those above and at
    it."""
    rank = dist.get_rank() if distributed() else 0
    return count - above.sum(0) - tied[:rank].sum(0)


def _largest_values(values: Tensor, count: int) -> Tensor:
    """This rank's `count` largest positive values, in no order, or all of them with zeros for the others."""
    return torch.where(values > 0, values, 0.0).topk(min(count, len(values)), sorted=False).values


def _border(largest: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count`-th largest value of all ranks, 0 if it is not positive, and how many values of each rank [ranks] are
    above and at it, of at most `count` each.

    `largest` are each rank's own `count` largest, at least 0, or fewer if it has no more. Nothing waits for the host,
    and ranks talk once, `count` numbers each.
    """
    if not distributed():
        border = largest.amin() if len(largest) == count else largest.new_zeros(())
        return border, (largest > border).sum().unsqueeze(0), (largest == border).sum().unsqueeze(0)
    gathered = all_gather(torch.cat([largest, largest.new_zeros(count - len(largest))]))  # [ranks, count]
    border = gathered.flatten().topk(count, sorted=False).values.amin()
    return border, (gathered > border).sum(1), (gathered == border).sum(1)


def _by_histogram(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest value by two histograms, of the upper and of the lower 16 bits: two small all-reduces."""
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
