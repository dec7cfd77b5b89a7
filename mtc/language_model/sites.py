"""The sites of the layers that are read, collected in a forward pass in which MLPs' outputs may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Sites:
    """Where a model's layers are read."""

    def __init__(self, mlps: Mlps, sites: Sequence[LayerConfig]):
        self._mlps, self._sites = mlps, sites

    @contextmanager
    def watch(self, replaced: Mapping[int, Replace] | None = None) -> Iterator[list[SitePair]]:
        """Collect the sites of the forward pass that runs inside, one pair for each layer that is read, and replace the
        MLP's output of those whose number is in `replaced`. What a layer above another one reads is of the pass in
        which that was replaced."""
        seen: list[Any] = [None] * len(self._sites)
        visits = {
            own.layer: _visit(seen, number, own, (replaced or {}).get(number)) for number, own in enumerate(self._sites)
        }
        with self._mlps.visited(visits):
            yield seen


def _visit(seen: list[Any], number: int, own: LayerConfig, replace: Replace | None) -> Visit:
    def visit(sources: Sources, mlp_out: Tensor) -> Tensor | None:
        every = {"resid_mid": sources.resid_mid, "mlp_in": sources.mlp_in, "mlp_out": mlp_out}
        seen[number] = SitePair(every[own.source][0], every[own.target][0])
        return None if replace is None else replace(*seen[number]).unsqueeze(0)

    return visit
