"""Random contexts of held-out text with all that fires in them, contexts.parquet: where features are silent, and which
fire together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

Array = NDArray[Any]
CONTEXTS = "contexts.parquet"
TOP_TOKENS = 3
"""Top tokens of a feature that make a silent context with one of them a near miss."""


class Together(NamedTuple):
    """Another feature that fires on the same tokens."""

    feature: int
    """Index of the other feature."""
    shared: int
    """Tokens of the contexts on which both fire."""
    lift: float
    """How many times more tokens these are than if the two had nothing to do with each other."""
    correlation: float
    """Correlation of whether the one and whether the other fires, over tokens, from -1 to 1."""


class RandomContexts:
    """The contexts, by feature and by token. Raises ValueError for a file that can't be read."""

    def __init__(self, parquet: bytes):
        table = pq.read_table(pa.BufferReader(parquet))
        self._table = table
        context, feature = _flat(table["feature"])
        lengths = pc.list_value_length(table["context_ids"].combine_chunks()).to_numpy()
        starts = np.cumsum(lengths) - lengths
        place = starts[context] + _flat(table["token"])[1]
        order = np.argsort(feature, kind="stable")
        self._by_feature = feature[order], context[order]
        self._places = place[order]
        """Of all that fires, ordered by feature, the token's number among those of all contexts."""
        self.window_ids: Array = table["window_id"].to_numpy()
        """[contexts] int64, the window that each is from."""
        self.num_tokens = int(lengths.sum())
        """Tokens of all contexts."""
        context, token = _flat(table["context_ids"])
        order = np.argsort(token, kind="stable")
        self._by_token = token[order], context[order]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> dict[str, Any]:
        """One context, as the file has it."""
        row: dict[str, Any] = self._table.slice(int(index), 1).to_pylist()[0]
        return row

    def tokens(self, index: int) -> tuple[str, ...]:
        """Texts of the tokens of one context."""
        return tuple(self._table["context_tokens"][int(index)].as_py())

    def with_feature(self, feature: int) -> Array:
        """Numbers of the contexts in which a feature fires, ascending."""
        return _found(*self._by_feature, [feature])

    def silent(self, feature: int, random: np.random.Generator) -> Array:
        """Numbers of the contexts in which a feature does not fire, in random order."""
        return random.permutation(np.setdiff1d(np.arange(len(self)), self.with_feature(feature)))

    def near_misses(self, silent: Array, related: Iterable[int], token_ids: Sequence[int]) -> Array:
        """Those of the silent contexts in which a related feature fires or one of some tokens stands, in turn one with
        such a token and one with such a feature, otherwise in their order."""
        by_token = np.isin(silent, _found(*self._by_token, token_ids))
        by_feature = np.isin(silent, _found(*self._by_feature, list(related)))
        turns = [silent[by_token], silent[by_feature & ~by_token]]
        near = [part[i] for i in range(max(map(len, turns))) for part in turns if i < len(part)]
        return np.array(near, np.int64)

    def totals(self, features: int) -> tuple[Array, Array]:
        """Of each of so many features the tokens on which it fires, [features] int64, and its summed activation,
        [features] float64."""
        feature, value = (_flat(self._table[name])[1] for name in ("feature", "activation"))
        return np.bincount(feature, minlength=features), np.bincount(feature, value, minlength=features)

    def together(self, feature: int, least: int) -> list[Together]:
        """The features that fire on the same tokens as one, at least on `least` of them, by correlation."""
        features = self._by_feature[0]
        if not len(features):
            return []
        own = self._places[slice(*np.searchsorted(features, [feature, feature + 1]))]
        on_own = np.zeros(self.num_tokens, bool)
        on_own[own] = True
        counts, shared = np.bincount(features), np.bincount(features[on_own[self._places]])
        found = []
        for other in np.flatnonzero(shared >= least).tolist():
            a, b, both, n = len(own), int(counts[other]), int(shared[other]), self.num_tokens
            spread = a * (n - a) * b * (n - b)
            if other != feature and spread:
                found.append(Together(other, both, both * n / (a * b), (n * both - a * b) / math.sqrt(spread)))
        return sorted(found, key=lambda one: (-one.correlation, one.feature))


def relatives(row: Mapping[str, Any], siblings: Iterable[int]) -> list[int]:
    """Features that are related to one: its nearest ones, its children, its parent and that one's other children.

    Args:
        row: the feature's row of features.parquet.
        siblings: the children of its parent; nothing without one.
    """
    near = [n["feature"] for n in row["neighbours"] or () if n["cosine"] > 0] + list(row["children"] or ())
    if row["parent"] is None:
        return near
    return [*near, row["parent"]["feature"], *(child for child in siblings if child != row["feature"])]


def own_tokens(row: Mapping[str, Any]) -> list[int]:
    """Ids of a feature's top tokens, one of which makes a silent context a near miss; `row` as of `relatives`."""
    return [token["token_id"] for token in (row["top_tokens"] or ())[:TOP_TOKENS]]


def _flat(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """Of lists the row of each item, and the items."""
    lists = column.combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy()
    return np.repeat(np.arange(len(lists)), lengths), lists.flatten().to_numpy()


def _found(keys: Array, values: Array, wanted: Sequence[int]) -> Array:
    """The values, each once, of the wanted keys; keys ascend."""
    spans = [(np.searchsorted(keys, key, "left"), np.searchsorted(keys, key, "right")) for key in wanted]
    return np.unique(np.concatenate([np.empty(0, np.int64), *(values[a:b] for a, b in spans)]))
