"""One rank's share of a dictionary whose features are spread over the ranks of a process group.

A rank holds a contiguous share of every group of the nested dictionary, so that each prefix is as much work for one
rank as for another. Shares of a group differ by one feature at most.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtc.config import ConfigError
from mtc.transcoder.distributed import distributed, world_size

BY_FEATURE = ("W_enc", "b_enc", "W_dec", "threshold", "tokens_since_fired", "dead")
"""Names of tensors, with all that optimizers keep for them, whose rows are features; every rank has all of the others.
One that is a scalar has no rows and is among the others."""


class Shard(NamedTuple):
    """Which features of the whole dictionary a rank holds."""

    rank: int
    ranks: int
    """Processes that share the dictionary."""
    group_sizes: tuple[int, ...]
    """Features of each group of the whole dictionary."""

    @classmethod
    def of_this_rank(cls, group_sizes: tuple[int, ...]) -> Shard:
        """The share of this process; raises ConfigError if a group has fewer features than there are ranks."""
        ranks = world_size()
        if min(group_sizes) < ranks:
            raise ConfigError(
                f"transcoder.group_sizes={list(group_sizes)}: {ranks} trainers cannot share a group of "
                f"{min(group_sizes)} features; take larger groups or fewer trainers"
            )
        return cls(dist.get_rank() if distributed() else 0, ranks, group_sizes)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and one-past-last feature of this rank in each group, counted from the group's first."""
        return [(self.rank * s // self.ranks, (self.rank + 1) * s // self.ranks) for s in self.group_sizes]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Features of each group on this rank."""
        return tuple(end - first for first, end in self.spans)

    @property
    def starts(self) -> list[int]:
        """Where each group begins among this rank's features, and their number at the end."""
        return [sum(self.sizes[:group]) for group in range(len(self.sizes) + 1)]

    @property
    def places(self) -> Tensor:
        """[this rank's features] int64, increasing: the places of this rank's features in the whole dictionary."""
        begins = [sum(self.group_sizes[:group]) for group in range(len(self.group_sizes))]
        return torch.cat([torch.arange(b + first, b + end) for b, (first, end) in zip(begins, self.spans, strict=True)])

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of rows [n, ...] that every rank has, as equal as they can be."""
        return rows[self.rank * len(rows) // self.ranks : (self.rank + 1) * len(rows) // self.ranks]

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Rows [this rank's features, ...] of each group."""
        return [rows[first:end] for first, end in pairwise(self.starts)]
