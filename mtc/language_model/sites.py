"""The sites of the layers that are read, collected in a forward pass in which MLPs' outputs may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from mtc.config import LayerConfig
from mtc.language_model.mlps import Mlps, Sources, Visit

Replace = Callable[[Tensor, Tensor], Tensor]
"""From source and mlp_out, both [tokens, d_model], what is added to the residual stream instead of mlp_out."""


class SitePair(NamedTuple):
    """Raw activations of one layer at the transcoder's two sites."""

    source: Tensor
    """[tokens, d_model] in the model's dtype: what the transcoder reads."""
    target: Tensor
    """[tokens, d_model] in the model's dtype: what the transcoder reconstructs."""


class _AllRead(BaseException):
    """Ends a forward pass in which nothing more is to be read. No Exception: those of a pass may be a compiler's."""


class Sites:
    """Where a model's layers are read."""

    def __init__(self, mlps: Mlps, sites: Sequence[LayerConfig]):
        self._mlps, self._sites = mlps, sites

    @contextmanager
    def watch(
        self, replaced: Mapping[int, Replace] | None = None, only: Collection[int] | None = None
    ) -> Iterator[list[SitePair]]:
        """Collect the sites of the forward pass that runs inside, one pair for each layer that is read, and replace the
        MLP's output of those whose number is in `replaced`. What a layer above another one reads is of the pass in
        which that was replaced.

        With `only`, the layers of these numbers are collected, and the pass ends behind the highest of them unless that
        is the highest of all.
        """
        seen: list[Any] = [None] * len(self._sites)
        chosen = range(len(self._sites)) if only is None else only
        highest = max(chosen, key=lambda number: self._sites[number].layer)
        ends = any(own.layer > self._sites[highest].layer for own in self._sites)
        visits = {
            self._sites[number].layer: _visit(
                seen, number, self._sites[number], (replaced or {}).get(number), ends and number == highest
            )
            for number in chosen
        }
        try:
            with self._mlps.visited(visits):
                yield seen
        except _AllRead:
            pass


def _visit(seen: list[Any], number: int, own: LayerConfig, replace: Replace | None, last: bool) -> Visit:
    def visit(sources: Sources, mlp_out: Tensor) -> Tensor | None:
        every = {"resid_mid": sources.resid_mid, "mlp_in": sources.mlp_in, "mlp_out": mlp_out}
        seen[number] = SitePair(every[own.source][0], every[own.target][0])
        if last:
            raise _AllRead
        return None if replace is None else replace(*seen[number]).unsqueeze(0)

    return visit
