"""Activating examples per feature, collected after training with the final weights.

`ExampleCollector` sees windows of held-out text and keeps, for every feature, its statistics, its strongest examples
(at most one per window, so that they differ) and a uniform sample of its activations of at least `min_activation`, each
with its quantile. Two collectors merge into what one would have found on all the text: the order of windows and of
merges does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mtc.work import PackedWindows

Array = NDArray[Any]
PAD = -1


class FeatureStatistics(NamedTuple):
    """How often and how strongly each feature fired."""

    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """[features] int64, activations above the threshold."""
    maximum: Array
    """[features] float32, strongest activation; 0 if none."""
    total: Array
    """[features] float64, sum of activations."""
    tokens: int
    """Analysed tokens."""


class _Rows(NamedTuple):
    """Candidate examples as columns; contexts are padded with PAD where the window ends."""

    feature: Array  # [n] int32
    activation: Array  # [n] float32
    window_id: Array  # [n] int64
    position: Array  # [n] int32, of the peak in the window
    token_id: Array  # [n] int32
    context_ids: Array  # [n, context_tokens + 1] int32
    context_activations: Array  # [n, context_tokens + 1] float32

    def take(self, index: Array) -> _Rows:
        return _Rows(*(column[index] for column in self))

    def sorted_by(self, *keys: Array) -> tuple[_Rows, Array]:
        """Rows ordered by feature, then `keys`; and each row's rank within its feature."""
        order = np.lexsort((*reversed(keys), self.feature))
        rows = self.take(order)
        starts = np.flatnonzero(np.r_[True, rows.feature[1:] != rows.feature[:-1]])
        lengths = np.diff(np.r_[starts, len(order)])
        return rows, np.arange(len(order)) - np.repeat(starts, lengths)


class ExampleCollector:
    """A mergeable accumulator; `context_tokens` is half before the peak and half after."""

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
            np.zeros(num_features, np.int64), np.zeros(num_features, np.float32), np.zeros(num_features, np.float64), 0
        )
        self.top = self._no_rows()
        self.sample = self._no_rows()

    def add(self, window_ids: Array, input_ids: Array, counted: Array, activations: Array) -> None:
        """Take in windows.

        Args: window_ids [W] int64; input_ids [W, T] integer; counted [W, T] bool, false for BOS and padding;
        activations [W, T, features] float32, zero where a feature is silent.
        """
        activations = np.where(counted[..., None], activations, np.float32(0))
        window, position, feature = np.nonzero(activations)
        value = activations[window, position, feature].astype(np.float32)
        count, maximum, total, tokens = self.statistics
        count = count + np.bincount(feature, minlength=self.num_features)
        total = total + np.bincount(feature, weights=value.astype(np.float64), minlength=self.num_features)
        maximum = np.maximum(maximum, activations.max(axis=(0, 1), initial=0))
        self.statistics = FeatureStatistics(count, maximum, total, tokens + int(counted.sum()))

        def rows(index: Array) -> _Rows:
            w, p, f = window[index], position[index], feature[index]
            reach = p[:, None] + np.arange(self.width) - self.before
            inside = (reach >= 0) & (reach < counted.shape[1])
            reach = np.clip(reach, 0, counted.shape[1] - 1)
            inside &= counted[w[:, None], reach]
            return _Rows(
                f.astype(np.int32), value[index], window_ids[w], p.astype(np.int32), input_ids[w, p].astype(np.int32),
                np.where(inside, input_ids[w[:, None], reach], PAD).astype(np.int32),
                np.where(inside, activations[w[:, None], reach, f[:, None]], 0).astype(np.float32),
            )  # fmt: skip

        strong = np.flatnonzero(value >= self.min_activation)
        # The first of a (window, feature)'s equal maxima is its peak.
        order = strong[np.lexsort((position[strong], -value[strong], feature[strong], window[strong]))]
        pair = window[order].astype(np.int64) * self.num_features + feature[order]
        peaks = order[np.r_[True, pair[1:] != pair[:-1]]] if len(order) else order
        self.top = self._keep_top(self.top, rows(peaks))
        if self.samples_per_feature:
            priority = _priority(window_ids[window[strong]], position[strong], feature[strong])
            by_feature = np.lexsort((priority, feature[strong]))
            f = feature[strong][by_feature]
            starts = np.flatnonzero(np.r_[True, f[1:] != f[:-1]]) if len(f) else np.empty(0, np.int64)
            rank = np.arange(len(f)) - np.repeat(starts, np.diff(np.r_[starts, len(f)]))
            chosen = strong[by_feature[rank < self.samples_per_feature]]
            self.sample = self._keep_sample(self.sample, rows(chosen))

    def add_packed(self, window_ids: Array, windows: PackedWindows, activations: Array) -> None:
        """Take in packed windows and the activations of their trainable tokens, [trainable, features].

        A few windows at a time, so that rectangles hold no more places than there are tokens, or one window's.
        """
        lengths = np.array(windows.lengths)
        ids, trainable = windows.input_ids.numpy(), windows.trainable.numpy()
        starts = np.r_[0, np.cumsum(lengths)]
        before = np.r_[0, np.cumsum(trainable)]  # trainable tokens before each token
        first = 0
        for end in range(1, len(lengths) + 1):
            if end < len(lengths) and (end + 1 - first) * lengths[first : end + 1].max() <= len(ids):
                continue
            some, tokens = lengths[first:end], slice(starts[first], starts[end])
            real = np.arange(some.max())[None, :] < some[:, None]  # [windows, longest]
            input_ids, counted = np.zeros(real.shape, np.int64), real.copy()
            input_ids[real], counted[real] = ids[tokens], trainable[tokens]
            dense = np.zeros((*real.shape, activations.shape[1]), np.float32)
            dense[counted] = activations[before[tokens.start] : before[tokens.stop]]
            self.add(window_ids[first:end], input_ids, counted, dense)
            first = end

    def merge(self, other: ExampleCollector) -> None:
        """Take in everything that `other` saw."""
        a, b = self.statistics, other.statistics
        self.statistics = FeatureStatistics(
            a.count + b.count, np.maximum(a.maximum, b.maximum), a.total + b.total, a.tokens + b.tokens
        )
        self.top = self._keep_top(self.top, other.top)
        self.sample = self._keep_sample(self.sample, other.sample)

    def table(self, document_ids: Callable[[Array], Sequence[str]], decode: Callable[[int], str]) -> pa.Table:
        """All examples ordered by feature, kind and rank; `decode` gives the text of one token id."""
        names: dict[int, str] = {}

        def text(token: int) -> str:
            if token not in names:
                names[token] = decode(token)
            return names[token]

        kinds = []
        for kind, rows in (("sample", self.sample), ("top", self.top)):
            rows, rank = rows.sorted_by(-rows.activation, rows.window_id, rows.position)
            size = np.bincount(rows.feature, minlength=self.num_features)[rows.feature]
            inside = rows.context_ids != PAD
            contexts = [ids[keep].tolist() for ids, keep in zip(rows.context_ids, inside, strict=True)]
            values = [a[keep].tolist() for a, keep in zip(rows.context_activations, inside, strict=True)]
            quantile = pa.array((size - 1 - rank) / size, pa.float32())
            kinds.append(pa.table({
                "feature": pa.array(rows.feature, pa.int32()),
                "kind": pa.array([kind] * len(rank), pa.string()),
                "rank": pa.array(rank, pa.int32()),
                "activation": pa.array(rows.activation, pa.float32()),
                "quantile": quantile if kind == "sample" else pa.nulls(len(rank), pa.float32()),
                "window_id": pa.array(rows.window_id, pa.int64()),
                "document_id": pa.array(list(document_ids(rows.window_id)), pa.string()),
                "position": pa.array(rows.position, pa.int32()),
                "token_id": pa.array(rows.token_id, pa.int32()),
                "token": pa.array([text(t) for t in rows.token_id.tolist()], pa.string()),
                "context_ids": pa.array(contexts, pa.list_(pa.int32())),
                "context_tokens": pa.array([[text(t) for t in c] for c in contexts], pa.list_(pa.string())),
                "context_activations": pa.array(values, pa.list_(pa.float32())),
                "peak_index": pa.array(inside[:, : self.before].sum(1), pa.int32()),
            }))  # fmt: skip
        table = pa.concat_tables(kinds)
        return table.sort_by([("feature", "ascending"), ("kind", "descending"), ("rank", "ascending")])

    def to_bytes(self) -> bytes:
        """Everything, as Arrow IPC, to travel between processes."""
        columns: dict[str, Array] = {}
        for kind, rows in (("top", self.top), ("sample", self.sample)):
            columns |= {f"{kind}.{name}": np.ascontiguousarray(c) for name, c in rows._asdict().items()}
        columns |= {name: np.asarray(value) for name, value in self.statistics._asdict().items()}
        fields = [pa.array([c.tobytes()], pa.large_binary()) for c in columns.values()]
        sink = pa.BufferOutputStream()
        batch = pa.record_batch(fields, names=list(columns))
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    def merge_bytes(self, data: bytes) -> None:
        """Merge what another collector with the same settings wrote with `to_bytes`."""
        row = pa.ipc.open_stream(data).read_all().to_pylist()[0]
        other = ExampleCollector(
            self.num_features, self.max_per_feature, self.samples_per_feature, self.width - 1, self.min_activation
        )
        for kind in ("top", "sample"):
            like = self._no_rows()._asdict()
            columns: dict[str, Array] = {
                n: np.frombuffer(row[f"{kind}.{n}"], c.dtype).reshape(-1, *c.shape[1:]) for n, c in like.items()
            }
            setattr(other, kind, _Rows(**columns))
        count, maximum, total, _ = other.statistics
        other.statistics = FeatureStatistics(
            np.frombuffer(row["count"], count.dtype),
            np.frombuffer(row["maximum"], maximum.dtype),
            np.frombuffer(row["total"], total.dtype),
            int(np.frombuffer(row["tokens"], np.int64)[0]),
        )
        self.merge(other)

    def _keep_top(self, a: _Rows, b: _Rows) -> _Rows:
        rows = _concatenate(a, b)
        rows, rank = rows.sorted_by(-rows.activation, rows.window_id, rows.position)
        return rows.take(rank < self.max_per_feature)

    def _keep_sample(self, a: _Rows, b: _Rows) -> _Rows:
        rows = _concatenate(a, b)
        rows, rank = rows.sorted_by(_priority(rows.window_id, rows.position, rows.feature))
        return rows.take(rank < self.samples_per_feature)

    def _no_rows(self) -> _Rows:
        def empty(dtype: type, *shape: int) -> Array:
            return np.empty((0, *shape), dtype)

        return _Rows(
            empty(np.int32), empty(np.float32), empty(np.int64), empty(np.int32), empty(np.int32),
            empty(np.int32, self.width), empty(np.float32, self.width),
        )  # fmt: skip


def to_parquet(table: pa.Table) -> bytes:
    """Parquet in small row groups ordered by feature, so that one feature reads without the rest."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4096, compression="zstd", write_statistics=True)
    return bytes(sink.getvalue())


def _concatenate(a: _Rows, b: _Rows) -> _Rows:
    return _Rows(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


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
