"""Rows on their way to the transcoders that they train, where trainers divide these among them (cluster.placement).

Whatever is divided, the tokens are dealt to trainers, shuffled, counted and resumed in the same way: each rank takes
its share of a batch. Where transcoders are divided the ranks then exchange these shares, so that each has its
transcoders' rows of the whole batch, in the order of ranks, and goes on alone. What a batch holds and the order of its
rows depend on the number of ranks, not on what they divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.placement import placed_members, split_of
from mtc.config import Member, RunConfig, SiteKey
from mtc.training import Unit
from mtc.transcoder import all_gather, alone, gather, waits

Found = TypeVar("Found")
Layout = Mapping[SiteKey, tuple[torch.dtype, int]]
"""Dtype and width of a site's rows."""


class Routing:
    """Which of the run's transcoders this rank trains, and how their rows come here; called on all ranks at once."""

    def __init__(self, config: RunConfig, rank: int, ranks: int, device: torch.device | str = "cpu"):
        members = {member.name: member for member in config.members()}
        self._names, self._placed = list(members), placed_members(config, ranks)
        self._apart = split_of(config, ranks) == "transcoders"
        self._rank, self._device = rank, torch.device(device)
        self._wanted = [_sites([members[name] for name in mine]) for mine in self._placed]
        self._layout: dict[SiteKey, tuple[torch.dtype, int]] = {}
        self.members = [members[name] for name in self._placed[rank]]
        """The transcoders that this rank trains."""
        self.writes = self._apart or rank == 0
        """Whether this rank's part of a checkpoint has its transcoders."""

    def alone(self) -> AbstractContextManager[None]:
        """For the trainers' own work: with several ranks only where these train the same transcoders."""
        return alone() if self._apart else nullcontext()

    def route(self, rows: Mapping[SiteKey, Tensor], counts: Sequence[int] | None = None) -> Mapping[SiteKey, Tensor]:
        """What this rank's transcoders train on of all ranks' `rows` [counts[rank], d] by site; empty where no rank
        ever had any. `counts` are asked for if they are not known."""
        if not self._apart:
            return rows
        if counts is None:
            counts = self._counts(len(next(iter(rows.values()))) if rows else 0)
        if not self._layout:  # a rank that never had a unit knows no dtype
            for layout in gather({key: (part.dtype, part.shape[1]) for key, part in rows.items()}):
                self._layout |= layout
        if not self._layout:
            return {}
        start = waits.mark(self._device)
        found = exchange(rows, counts, self._wanted, self._layout, self._rank, self._device)
        waits.add(start, waits.mark(self._device))
        return found

    def rounds(self, units: Iterator[Unit]) -> Iterator[Mapping[SiteKey, Tensor]]:
        """What this rank's transcoders get of all ranks' units, of which ranks may have different numbers."""
        if not self._apart:
            yield from (unit.activations for unit in units)
            return
        while True:
            unit = next(units, None)
            counts = self._counts(-1 if unit is None else len(unit.rows))
            if max(counts) < 0:
                return
            yield self.route(unit.activations if unit else {}, [max(count, 0) for count in counts])

    def gather(self, own: Sequence[Found]) -> list[Found]:
        """One small object for each of the run's transcoders, in order, of `own` for each of this rank's."""
        if not self._apart:
            return list(own)
        pairs = zip(self._placed, gather(list(own)), strict=True)
        found = {name: each for names, theirs in pairs for name, each in zip(names, theirs, strict=True)}
        return [found[name] for name in self._names]

    def _counts(self, own: int) -> list[int]:
        """Every rank's number, waited for."""
        start = waits.mark(torch.device("cpu"))
        counts: list[int] = all_gather(torch.tensor(own)).tolist()
        waits.add(start, waits.mark(torch.device("cpu")))
        return counts


def exchange(
    rows: Mapping[SiteKey, Tensor],
    counts: Sequence[int],
    wanted: Sequence[Sequence[SiteKey]],
    layout: Layout,
    rank: int,
    device: torch.device,
) -> dict[SiteKey, Tensor]:
    """All ranks' rows of the sites that this rank wants, [sum of counts, d] each, in the order of ranks.

    `rows` are this rank's [counts[rank], d] by site, which a rank with none may lack; `wanted` the sites of each rank.
    Rows that several want are sent to each, those that stay here are copied. Called on all ranks at once.
    """
    found = {}
    transfers: list[dist.P2POp] = []
    for tag, key in enumerate(sorted(layout)):  # pairs of ranks meet in the same order
        if counts[rank]:
            others = [other for other, keys in enumerate(wanted) if key in keys and other != rank]
            mine = rows[key].contiguous()
            transfers += [dist.P2POp(dist.isend, mine, other, tag=tag) for other in others]
        if key in wanted[rank]:
            dtype, width = layout[key]
            found[key] = torch.empty(sum(counts), width, dtype=dtype, device=device)
            for other, part in enumerate(found[key].split(list(counts))):
                if other == rank and len(part):
                    part.copy_(rows[key])
                elif len(part):
                    transfers.append(dist.P2POp(dist.irecv, part, other, tag=tag))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    return found


def _sites(members: Sequence[Member]) -> list[SiteKey]:
    pairs = (sites for member in members for sites in member.config.model.sites)
    return sorted({key for sites in pairs for key in (sites.source_key, sites.target_key)})
