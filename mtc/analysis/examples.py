"""Activating examples per feature, collected after training with the final weights.

`ExampleCollector` sees windows of held-out text and keeps, for every feature, its statistics, its strongest examples
(at most one per window, so that they differ) and a uniform sample of its activations of at least `min_activation`, each
with its quantile. Two collectors merge into what one would have found on all the text: the order of windows and of
merges does not matter. The text around an example is not carried along; it is read again from the token store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mtc.analysis.token_sums import SparseActivations
    from mtc.language_model import PackedWindows
    from mtc.text import TokenTexts

Array = NDArray[Any]
EDGES = 2.0 ** np.arange(-6, 10.5, 0.5)
"""Borders of the bins of FeatureStatistics.histogram, two per octave; the first and last bin take what lies outside."""
PENDING_ROWS = 1 << 17  # candidates that wait before they are sorted into those that are kept


class FeatureStatistics(NamedTuple):
    """How often and how strongly each feature fired."""

    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """[features] int64, tokens on which the activation is above the threshold."""
    maximum: Array
    """[features] float32, strongest activation in scaled units; 0 if none."""
    total: Array
    """[features] float64, sum of activations in scaled units."""
    histogram: Array
    """[features, len(EDGES) - 1] int64, activations between the borders EDGES."""
    tokens: int
    """Tokens that were analysed, whether or not a feature fired on them."""


class Contexts(NamedTuple):
    """The tokens around the peaks of some examples; column `peak` holds the peaks."""

    token: Array
    """[examples, context_tokens + 1] int32, ids; anything where `inside` is false."""
    inside: Array
    """[examples, context_tokens + 1] bool: inside the example's window, and no special token."""
    peak: int
    """Column of the peaks."""


class Examples:
    """All kept examples, ordered by feature, kind and rank; `table` gives them with their text."""

    SCHEMA = pa.schema({
        "feature": pa.int32(),
        "kind": pa.string(),
        "rank": pa.int32(),
        "activation": pa.float32(),
        "quantile": pa.float32(),
        "window_id": pa.int64(),
        "document_id": pa.string(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "token": pa.string(),
        "context_ids": pa.list_(pa.int32()),
        "context_tokens": pa.list_(pa.string()),
        "context_activations": pa.list_(pa.float32()),
        "peak_index": pa.int32(),
    })  # fmt: skip
    CHUNK = 4096

    def __init__(
        self,
        rows: _Rows,
        is_top: Array,
        rank: Array,
        quantile: Array,
        before: int,
        windows: Callable[[Array], Sequence[Array]],
        special: Sequence[int],
        document_ids: Callable[[Array], Sequence[str]],
        texts: TokenTexts,
    ):
        self._rows, self._rank, self._quantile, self._before = rows, rank, quantile, before
        self._windows, self._special, self._document_ids = windows, special, document_ids
        self.texts = texts
        """The texts of tokens."""
        self.is_top = is_top
        """[examples] bool: one of the feature's strongest examples, not a uniformly drawn one."""
        self.feature = rows.feature
        """[examples] int32, index of the feature that fires."""
        self.token_id = self._peak_ids()
        """[examples] int32, id of the token at the peak."""

    def __len__(self) -> int:
        return len(self.feature)

    def token(self, token_id: int) -> str:
        """The text of the token with this id, as TokenTexts gives it alone."""
        return self.texts.token(token_id)

    def contexts(self, index: Array) -> Contexts:
        """The tokens around the peaks of the examples at some indices, read from their windows."""
        window_id, position = self._rows.window_id[index], self._rows.position[index]
        unique, which = np.unique(window_id, return_inverse=True)
        texts = self._windows(unique)
        starts = np.r_[0, np.cumsum([len(t) for t in texts])].astype(np.int64)
        ids = np.concatenate([*texts, np.zeros(1, np.int32)])  # never without an id to point at
        reach = position[:, None] + np.arange(self._rows.context.shape[1]) - self._before
        inside = (reach >= 0) & (reach < (starts[1:] - starts[:-1])[which][:, None])
        token = ids[np.where(inside, starts[which][:, None] + reach, 0)].astype(np.int32)
        return Contexts(token, inside & ~np.isin(token, self._special), self._before)

    def table(self, features: Sequence[int] | None = None) -> pa.Table:
        """The examples of some features, or of all, with their text; columns as in SCHEMA."""
        wanted = np.arange(len(self)) if features is None else np.flatnonzero(np.isin(self.feature, features))
        return pa.Table.from_batches([b for t in self._tables(wanted) for b in t.to_batches()], self.SCHEMA)

    def to_parquet(self) -> bytes:
        """The examples as a Parquet file in small row groups ordered by feature, so that one feature reads without the
        rest."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.SCHEMA, compression="zstd", write_statistics=True) as writer:
            for table in self._tables(np.arange(len(self))):
                writer.write_table(table)
        return bytes(sink.getvalue())

    def _tables(self, wanted: Array) -> Iterator[pa.Table]:
        for start in range(0, len(wanted), self.CHUNK):
            yield self._chunk(wanted[start : start + self.CHUNK])

    def _chunk(self, index: Array) -> pa.Table:
        rows = self._rows.take(index)
        top = self.is_top[index]
        unique, which = np.unique(rows.window_id, return_inverse=True)
        token, inside, _ = self.contexts(index)
        borders = np.r_[0, np.cumsum(inside.sum(1))].astype(np.int32)
        context_ids, context = token[inside], rows.context[inside]
        names, of_name = np.unique(np.r_[context_ids, self.token_id[index]], return_inverse=True)
        texts_of = [self.token(int(t)) for t in names]
        n = len(context_ids)
        # Only where characters have several tokens does a context read otherwise than its tokens alone.
        parts = np.array([self.texts.is_part(int(t)) for t in names], bool)[of_name[:n]]
        for row in np.unique(np.searchsorted(borders, np.flatnonzero(parts), "right") - 1):
            first, end = borders[row : row + 2]
            of_name[first:end] = np.arange(len(texts_of), len(texts_of) + end - first)
            texts_of += self.texts.sequence(context_ids[first:end].tolist())
        strings = pa.array(texts_of, pa.string()).take(pa.array(of_name))
        documents = np.array(list(self._document_ids(unique)), object)[which]
        columns = {
            "feature": pa.array(rows.feature, pa.int32()),
            "kind": pa.array(np.where(top, "top", "sample").tolist(), pa.string()),
            "rank": pa.array(self._rank[index], pa.int32()),
            "activation": pa.array(rows.activation, pa.float32()),
            "quantile": pa.array(self._quantile[index], pa.float32(), mask=top),
            "window_id": pa.array(rows.window_id, pa.int64()),
            "document_id": pa.array(documents.tolist(), pa.string()),
            "position": pa.array(rows.position, pa.int32()),
            "token_id": pa.array(self.token_id[index], pa.int32()),
            "token": strings.slice(n),
            "context_ids": pa.ListArray.from_arrays(borders, pa.array(context_ids, pa.int32())),
            "context_tokens": pa.ListArray.from_arrays(borders, strings.slice(0, n)),
            "context_activations": pa.ListArray.from_arrays(borders, pa.array(context, pa.float32())),
            "peak_index": pa.array(inside[:, : self._before].sum(1), pa.int32()),
        }
        return pa.table(columns, schema=self.SCHEMA)

    def _peak_ids(self) -> Array:
        unique, which = np.unique(self._rows.window_id, return_inverse=True)
        found = np.empty(len(self), np.int32)
        order = np.argsort(which, kind="stable")
        for start in range(0, len(unique), self.CHUNK):
            texts = self._windows(unique[start : start + self.CHUNK])
            starts = np.r_[0, np.cumsum([len(t) for t in texts])].astype(np.int64)
            ids = np.concatenate([*texts, np.empty(0, np.int32)])
            first, last = np.searchsorted(which[order], [start, start + len(texts)])
            some = order[first:last]
            found[some] = ids[starts[which[some] - start] + self._rows.position[some]]
        return found


class ExampleCollector:
    """A mergeable accumulator of examples and statistics; half of `context_tokens` lie before the peak and half
    after."""

    def __init__(
        self,
        num_features: int,
        max_per_feature: int,
        samples_per_feature: int,
        context_tokens: int,
        min_activation: float,
    ):
        self.num_features = num_features
        self.max_per_feature = max_per_feature
        self.samples_per_feature = samples_per_feature
        self.before = context_tokens // 2
        self.width = context_tokens + 1
        self.min_activation = min_activation
        self.statistics = FeatureStatistics(
            np.zeros(num_features, np.int64), np.zeros(num_features, np.float32), np.zeros(num_features, np.float64),
            np.zeros((num_features, len(EDGES) - 1), np.int64), 0,
        )  # fmt: skip
        self._top = _Kept(num_features, max_per_feature, self.width, _by_strength)
        self._sample = _Kept(num_features, samples_per_feature, self.width, _by_priority)

    def add(self, window_ids: Array, windows: PackedWindows, sparse: SparseActivations) -> None:
        """Take in packed windows and the activations of their trainable tokens.

        Args: window_ids [windows] int64; `sparse.token` counts the trainable tokens.
        """
        lengths = np.array(windows.lengths, np.int64)
        trainable = windows.trainable.numpy()
        place = np.flatnonzero(trainable)[sparse.token]  # of each entry in the packed row
        window = np.repeat(np.arange(len(lengths)), lengths)[place]
        feature, value = sparse.feature, sparse.value
        self._count(feature, value, int(trainable.sum()))
        key = feature * len(trainable) + place  # ascending, as entries are ordered
        starts = np.cumsum(lengths) - lengths

        def rows(index: Array) -> _Rows:
            w, p, f = window[index], place[index], feature[index]
            reach = p[:, None] + np.arange(self.width) - self.before
            inside = (reach >= starts[w][:, None]) & (reach < (starts + lengths)[w][:, None])
            near = f[:, None] * len(trainable) + reach
            at = np.minimum(np.searchsorted(key, near), len(key) - 1)
            return _Rows(
                f.astype(np.int32), value[index], window_ids[w], (p - starts[w]).astype(np.int32),
                np.where(inside & (key[at] == near), value[at], np.float32(0)),
            )  # fmt: skip

        strong = np.flatnonzero(value >= self.min_activation)
        if not len(strong):
            return
        # Entries of a feature in a window lie together; the first of equal maxima is the peak.
        f, w, v = feature[strong], window[strong], value[strong]
        starts_here = np.r_[True, (f[1:] != f[:-1]) | (w[1:] != w[:-1])]
        pair = np.cumsum(starts_here) - 1
        highest = np.flatnonzero(v == np.maximum.reduceat(v, np.flatnonzero(starts_here))[pair])
        peaks = strong[highest[np.r_[True, pair[highest[1:]] != pair[highest[:-1]]]]]
        self._top.add(rows(peaks[self._top.may_enter(feature[peaks], -value[peaks])]))
        if self.samples_per_feature:
            priority = _priority(window_ids[w], place[strong] - starts[w], f)
            chosen = self._sample.may_enter(f, priority)
            chosen = chosen[_rank(f[chosen], priority[chosen]) < self.samples_per_feature]
            self._sample.add(rows(strong[chosen]))

    def _count(self, feature: Array, value: Array, tokens: int) -> None:
        n, bins = self.num_features, len(EDGES) - 1
        old = self.statistics
        bin_of = np.clip(np.searchsorted(EDGES, value, "right") - 1, 0, bins - 1)
        maximum = old.maximum.copy()
        np.maximum.at(maximum, feature, value)
        self.statistics = FeatureStatistics(
            old.count + np.bincount(feature, minlength=n),
            maximum,
            old.total + np.bincount(feature, weights=value.astype(np.float64), minlength=n),
            old.histogram + np.bincount(feature * bins + bin_of, minlength=n * bins).reshape(n, bins),
            old.tokens + tokens,
        )

    def examples(
        self,
        windows: Callable[[Array], Sequence[Array]],
        special: Sequence[int],
        document_ids: Callable[[Array], Sequence[str]],
        texts: TokenTexts,
    ) -> Examples:
        """All examples kept; `windows` gives the token ids of windows, `document_ids` their documents, `texts` the text
        of tokens.

        Tokens among the `special` ids are left out of contexts.
        """
        kinds = []
        for kept in (self._top, self._sample):
            rows = kept.rows()
            order = np.lexsort((rows.position, rows.window_id, -rows.activation, rows.feature))
            rows = rows.take(order)
            rank = _place_in_feature(rows.feature)
            size = np.bincount(rows.feature, minlength=self.num_features)[rows.feature]
            kinds.append((rows, rank, ((size - 1 - rank) / np.maximum(size, 1)).astype(np.float32)))
        (top, *_), (sample, *_) = kinds
        is_top = np.r_[np.ones(len(top.feature), bool), np.zeros(len(sample.feature), bool)]
        rows = _concatenate([top, sample])
        order = np.lexsort((~is_top, rows.feature))  # stable: ranks stay in order
        rank, quantile = (np.concatenate([kind[i] for kind in kinds])[order] for i in (1, 2))
        return Examples(
            rows.take(order), is_top[order], rank, quantile, self.before, windows, special, document_ids, texts
        )

    def arrays(self) -> dict[str, Array]:
        """Everything that was collected, to travel between processes."""
        columns = {f"statistics.{n}": np.asarray(v) for n, v in self.statistics._asdict().items()}
        for name, kept in (("top", self._top), ("sample", self._sample)):
            columns |= {f"{name}.{n}": column for n, column in kept.rows()._asdict().items()}
        return columns

    def merge_arrays(self, arrays: dict[str, Any]) -> None:
        """Merge what another collector with the same settings gave with `arrays`."""
        a = self.statistics
        b = FeatureStatistics(**{n: arrays[f"statistics.{n}"] for n in FeatureStatistics._fields})
        self.statistics = FeatureStatistics(
            a.count + b.count, np.maximum(a.maximum, b.maximum), a.total + b.total, a.histogram + b.histogram,
            a.tokens + int(b.tokens),
        )  # fmt: skip
        for name, kept in (("top", self._top), ("sample", self._sample)):
            kept.add(_Rows(*(arrays[f"{name}.{n}"] for n in _Rows._fields)))


class _Rows(NamedTuple):
    """Candidate examples as columns."""

    feature: Array  # [n] int32
    activation: Array  # [n] float32
    window_id: Array  # [n] int64
    position: Array  # [n] int32, of the peak in the window
    context: Array  # [n, context_tokens + 1] float32, activations around the peak, 0 outside the window

    def take(self, index: Array) -> _Rows:
        return _Rows(*(column[index] for column in self))


class _Kept:
    """The first `limit` rows of each feature by an order that does not depend on when they came."""

    def __init__(self, num_features: int, limit: int, width: int, order: Callable[[_Rows], tuple[Array, ...]]):
        self.limit = limit
        self._order = order
        self._parts = [
            _Rows(
                np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int32),
                np.empty((0, width), np.float32),
            )
        ]  # fmt: skip
        self._pending = 0
        self._bound: Array | None = None
        """[features], first key of the last row kept of a feature that is full, the largest value for others."""
        self._num_features = num_features

    def add(self, rows: _Rows) -> None:
        if not self.limit or not len(rows.feature):
            return
        self._parts.append(rows)
        self._pending += len(rows.feature)
        if self._pending > max(PENDING_ROWS, len(self._parts[0].feature)):
            self.rows()

    def may_enter(self, feature: Array, key: Array) -> Array:
        """Indices of the candidates that are not surely behind the rows already kept."""
        if self._bound is None:
            return np.arange(len(feature))
        return np.flatnonzero(key <= self._bound[feature])

    def rows(self) -> _Rows:
        """The kept rows, ordered by feature and then by the order."""
        if self._pending:
            rows = _concatenate(self._parts)
            keys = self._order(rows)
            order = np.lexsort((*reversed(keys), rows.feature))
            feature = rows.feature[order]
            rank = _place_in_feature(feature)
            order = order[rank < self.limit]
            first = keys[0]
            rows, key = rows.take(order), first[order]
            largest = np.inf if first.dtype.kind == "f" else np.iinfo(first.dtype).max
            bound = np.full(self._num_features, largest, first.dtype)
            last = rank[rank < self.limit] == self.limit - 1
            bound[rows.feature[last]] = key[last]
            self._parts, self._pending, self._bound = [rows], 0, bound
        return self._parts[0]


def _by_strength(rows: _Rows) -> tuple[Array, ...]:
    return -rows.activation, rows.window_id, rows.position


def _by_priority(rows: _Rows) -> tuple[Array, ...]:
    # Beside the priority only for the one case in 2^64 that two are equal.
    return _priority(rows.window_id, rows.position, rows.feature), rows.window_id, rows.position


def _place_in_feature(feature: Array) -> Array:
    """0, 1, 2, ... within each run of equal features."""
    starts = np.flatnonzero(np.r_[True, feature[1:] != feature[:-1]]) if len(feature) else np.empty(0, np.int64)
    return np.arange(len(feature)) - np.repeat(starts, np.diff(np.r_[starts, len(feature)]))


def _rank(feature: Array, key: Array) -> Array:
    """[entries] int64, place of each entry among those of its feature by `key`, from 0."""
    order = np.lexsort((key, feature))
    rank = np.empty(len(feature), np.int64)
    rank[order] = _place_in_feature(feature[order])
    return rank


def _concatenate(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _priority(window_id: Array, position: Array, feature: Array) -> Array:
    """A fixed pseudo-random uint64 per activation (splitmix64): the smallest ones are a uniform sample."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        mixed = np.zeros(len(window_id), np.uint64)
        for part in (window_id, position, feature):
            mixed = (mixed + part.astype(np.uint64) + np.uint64(1)) * golden
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed
