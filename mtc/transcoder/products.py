"""Sums of weighted rows and dot products at chosen entries, what the sparse loss and its gradients are made of.

On CPUs compiled loops (kernels.c) for float32; everywhere else torch operations, the same on CPU and GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mtc.devices import is_gpu
from mtc.transcoder import native

LONGEST_PIECE = 64
"""Most entries that a GPU sums one after another."""


class Workspace:
    """Memory that is written again at every step: on a CPU, fresh pages cost more than the sums that fill them."""

    def __init__(self) -> None:
        self.border: float = 0.0
        """Smallest entry chosen at the last step, a hint for `largest_entries`."""
        self._free: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of `like`'s dtype and device; the caller's until it is given back."""
        found = self._free.pop(name, None)
        if found is not None and found.shape == shape and found.dtype == like.dtype and found.device == like.device:
            return found
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, name: str, tensor: Tensor) -> None:
        if not is_gpu(tensor.device):  # there the allocator keeps memory anyway
            self._free[name] = tensor


class Bags(NamedTuple):
    """Consecutive entries in bags, each to be summed."""

    offsets: Tensor
    """[bags + 1] int64: where each bag's entries begin; the last is how many entries there are."""
    pieces: Tensor | None = None
    """[pieces + 1] int64, on a GPU: where parts of at most LONGEST_PIECE entries begin, empty ones at the end."""
    first: Tensor | None = None
    """[bags + 1] int64, on a GPU: where each bag's pieces begin."""


def make_bags(offsets: Tensor, entries: int) -> Bags:
    """Bags that begin at `offsets` [bags + 1], of so many entries in all; nothing waits for the host.

    A GPU walks through a piece one entry after another, so that a feature which fires on every token would hold up all
    others: long bags are cut. As many pieces are made as there can be, since their number is known to the device only.
    """
    if not is_gpu(offsets.device):
        return Bags(offsets)
    bags = len(offsets) - 1
    count = (offsets.diff() + LONGEST_PIECE - 1).div(LONGEST_PIECE, rounding_mode="floor")
    first = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    piece = torch.arange(bags + entries // LONGEST_PIECE, device=offsets.device)
    bag = torch.searchsorted(first[1:], piece, right=True).clamp(max=bags - 1)
    starts = offsets[bag] + (piece - first[bag]) * LONGEST_PIECE
    return Bags(offsets, torch.cat([torch.minimum(starts, offsets[bag + 1]), offsets[-1:]]), first)


def bag_sums(
    table: Tensor, index: Tensor, weight: Tensor, bags: Bags, workspace: Workspace | None = None, name: str = ""
) -> Tensor:
    """[bags, width]: sums of weight[e] * table[index[e]] over each bag's entries.

    Always in the same order, so the same to the last bit. Written into the workspace's memory of that name, if any,
    where the compiled loop runs.
    """
    if native.runs(table):
        shape = (len(bags.offsets) - 1, table.shape[1])
        out = table.new_empty(shape) if workspace is None else workspace.take(name, shape, table)
        native.call("bag_sums", table.contiguous(), index, weight, bags.offsets, out, *shape)
        return out
    offsets = bags.offsets if bags.pieces is None else bags.pieces
    sums = embedding_bag(index, table, offsets, per_sample_weights=weight, mode="sum", include_last_offset=True)
    if bags.first is None:
        return sums
    return torch.segment_reduce(sums, "sum", offsets=bags.first, axis=0, unsafe=True, initial=0)  # unsafe: no waiting


def entry_dots(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor) -> Tensor:
    """[entries]: left[left_index[e]] . right[right_index[e]]; `left_index` is non-decreasing."""
    if native.runs(left):
        out = left.new_empty(len(left_index))
        native.call("entry_dots", left.contiguous(), left_index, right, right_index, out, len(out), left.shape[1])
        return out
    # What embedding_bag's own backward calls: the products are summed without being written down. It is private, and
    # reads rows as if they were contiguous.
    if not all(t.is_contiguous() for t in (left, left_index, right, right_index)):
        raise ValueError("entry_dots takes contiguous tensors")
    offsets = torch.searchsorted(left_index, torch.arange(len(left), device=left.device))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, right_index, offsets, left_index, 0)
