"""What random contexts tell of a feature: where it might fire and does not, and what fires together with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mtc.storage import RandomContexts, Together, own_tokens, relatives
from serve.service.feature_table import FeatureTable

NEAR_MISSES = 8
"""Most near misses of a page."""
TOGETHER, LEAST_TOGETHER = 10, 3
"""Most features that fire together with one, and fewest tokens on which each does."""


class NearMiss(NamedTuple):
    """A context in which a feature is silent though one of its tokens stands there, or a relative fires."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    marked: tuple[int, ...]
    """Indices of the tokens that are its own, or on which the relative fires; the relative's strongest first."""
    relative: int | None
    """The related feature that fires; None where a token of its own stands."""
    activation: float | None
    """Strongest activation of the relative, in scaled units."""
    position: int
    """Place of the first of `marked` in its window, from 0; of one whose special tokens are left out about that."""
    document_id: str
    """Id of the document that the context is from."""


def near_misses(table: FeatureTable, feature: int) -> list[NearMiss]:
    """A few near misses, the same whenever it is asked; none of a run without random contexts, or of a feature without
    tokens and relatives."""
    contexts, row = table.contexts, table.row(feature)
    if contexts is None:
        return []
    related = relatives(row, table.feature(row["parent"]["feature"]).children if row["parent"] else ())
    own = own_tokens(row)
    silent = contexts.silent(feature, np.random.default_rng(feature))
    chosen = contexts.near_misses(silent, related, own)[:NEAR_MISSES]
    return [_near_miss(contexts.row(index), set(related), set(own)) for index in chosen]


def together(table: FeatureTable, feature: int) -> list[Together]:
    """The features that fire together with one most; see RandomContexts.together."""
    contexts: RandomContexts | None = table.contexts
    return contexts.together(feature, LEAST_TOGETHER)[:TOGETHER] if contexts else []


def _near_miss(row: dict[str, Any], related: set[int], own: set[int]) -> NearMiss:
    marked = [i for i, token_id in enumerate(row["context_ids"]) if token_id in own]
    relative = activation = None
    if not marked:
        fires = zip(row["activation"], row["feature"], row["token"], strict=True)
        fired = sorted((fire for fire in fires if fire[1] in related), key=lambda fire: (-fire[0], fire[1:]))
        activation, relative, _ = fired[0]
        marked = [token for _, each, token in fired if each == relative]
    place = row["position"] + marked[0]
    return NearMiss(tuple(row["context_tokens"]), tuple(marked), relative, activation, place, row["document_id"])
