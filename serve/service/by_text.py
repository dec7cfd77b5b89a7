"""`POST /features/by-text`: both sides encoded as `/encode` does it, and compared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from serve.contract import (
    ByTextRequest,
    ContrastRow,
    Encoded,
    EncodeRequest,
    ServiceError,
    SideFigures,
    Tokenised,
)
from serve.service.contrast import Side, contrast, largest_by_chance, side_of_contexts, side_of_texts
from serve.service.feature_table import FeatureTable
from serve.service.served_run import ServedLayer
from serve.service.service import Service

_OF_THE_TABLE = ("feature", "label", "label_by", "density", "max_activation", "massive", "copy_of")
"""Figures of a feature that are the same as in `GET /features`."""


class ByText(NamedTuple):
    """What tells two sides apart."""

    rows: list[ContrastRow]
    """Features, the one that tells most first."""
    tokens: int
    """Tokens of the texts."""
    against_tokens: int
    """Tokens of what they are compared with."""
    largest_by_chance: float
    """What |z| of two sides that are alike stays below."""
    inputs: list[Tokenised]
    """All texts that were encoded, of both sides."""


async def by_text(service: Service, own: ServedLayer, table: FeatureTable, asked: ByTextRequest) -> ByText:
    """Encode the texts and rank what tells them from `against`, or from the run's random contexts.

    Raises ServiceError as `/encode`, and 404 for a run without random contexts where there is no `against`.
    """
    texts, against = asked.sides
    request = EncodeRequest.model_validate(
        {"inputs": [*texts, *against], "truncate": asked.truncate, "prefix": asked.prefix, "return": "csr"}
    )
    options = service.options(own, request, csr=True)
    if not against:  # before any work, so that a run without random contexts costs none
        await table.read_contexts()
        table.require_contexts(", or send a text as `against`")
    inputs = await service.tokenise(own.run, request, asked.name)
    encoded = [each async for _, each in service.encode_inputs(own.run, inputs, options)]
    return await asyncio.to_thread(_compare, table, own, asked, inputs, encoded)


def _compare(
    table: FeatureTable, own: ServedLayer, asked: ByTextRequest, inputs: list[Tokenised], encoded: Sequence[Encoded]
) -> ByText:
    pairs, count, features = list(zip(inputs, encoded, strict=True)), len(asked.sides[0]), own.num_features
    one, other = side_of_texts(pairs[:count], features), side_of_texts(pairs[count:], features)
    if not asked.sides[1]:
        other = side_of_contexts(table.require_contexts(), features)
    for name, side in (("texts", one), ("against", other)):
        if not side.tokens:
            raise ServiceError(400, "empty_inputs", f"{name} has no token", {"field": name})
    prefix = asked.prefix or features
    found = contrast(one, other, table.max_activations, prefix)
    rows = []
    for row in table.rows(found.first(asked.top_k)):
        j = row["feature"]
        own_figures = {name: row[name] for name in _OF_THE_TABLE}
        statistics = {name: float(values[j]) for name, values in found._asdict().items()}
        sides = {"texts": _figures(one, j), "against": _figures(other, j)}
        rows.append(ContrastRow.model_validate(own_figures | statistics | sides))
    return ByText(rows, one.tokens, other.tokens, largest_by_chance(prefix), inputs)


def _figures(side: Side, feature: int) -> SideFigures:
    fires, total = int(side.fires[feature]), float(side.total[feature])
    return SideFigures(fires=fires, share=fires / side.tokens, mean_activation=total / side.tokens)
