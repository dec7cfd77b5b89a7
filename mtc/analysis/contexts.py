"""Random contexts of the held-out text with all that fires in them, whatever it is: contexts.parquet.

Examples are of one feature each and say nothing of the others, so they can't tell where a feature is silent. These
can: what a label is held against, near misses, and what a text is compared with are taken from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mtc.analysis.token_sums import SparseActivations
    from mtc.language_model import PackedWindows
    from mtc.text import TokenTexts

Array = NDArray[Any]
SCHEMA = pa.schema({
    "window_id": pa.int64(),
    "document_id": pa.string(),
    "position": pa.int32(),  # of the first token in the window
    "context_ids": pa.list_(pa.int32()),
    "context_tokens": pa.list_(pa.string()),
    "feature": pa.list_(pa.int32()),
    "token": pa.list_(pa.int32()),  # index in context_tokens
    "activation": pa.list_(pa.float32()),
})  # fmt: skip


def choose_windows(windows: Array, count: int, seed: int) -> Array:
    """[at most count] int64, ascending: windows drawn without replacement, one context of each."""
    drawn = np.random.default_rng(seed).permutation(np.unique(windows))[:count]
    return np.sort(drawn.astype(np.int64))


class ContextCollector:
    """One context of each of the `chosen` windows, [windows] int64 ascending, as they come; merges with others.

    A context is `width` tokens of its window, or all of a shorter one; where it begins depends on the window's id
    alone.
    """

    def __init__(self, chosen: Array, width: int):
        self.chosen, self.width = chosen, width
        self._columns: dict[str, list[Array]] = {name: [] for name in ("window", "feature", "position", "value")}
        self._seen: list[Array] = []

    def add(self, window_ids: Array, windows: PackedWindows, sparse: SparseActivations) -> None:
        """Take in packed windows and the activations of their trainable tokens; as ExampleCollector.add."""
        wanted = np.isin(window_ids, self.chosen)
        if not wanted.any():
            return
        lengths = np.array(windows.lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        window = np.repeat(np.arange(len(lengths)), lengths)
        place = np.flatnonzero(windows.trainable.numpy())[sparse.token]
        position = place - starts[window[place]]
        first = _first(window_ids, lengths, self.width)[window[place]]
        inside = wanted[window[place]] & (position >= first) & (position < first + self.width)
        self._seen.append(np.stack([window_ids[wanted], lengths[wanted]], 1).astype(np.int64))
        self._append(
            window=window_ids[window[place[inside]]].astype(np.int64),
            feature=sparse.feature[inside].astype(np.int32),
            position=position[inside].astype(np.int32),
            value=sparse.value[inside].astype(np.float32),
        )

    def arrays(self) -> dict[str, Array]:
        """Everything that was collected, to travel between processes."""
        empty = {"window": np.int64, "feature": np.int32, "position": np.int32, "value": np.float32}
        found = {n: np.concatenate([np.empty(0, empty[n]), *parts]) for n, parts in self._columns.items()}
        return found | {"seen": np.concatenate([np.empty((0, 2), np.int64), *self._seen])}

    def merge_arrays(self, arrays: dict[str, Any]) -> None:
        """Take in what another collector with the same settings gave with `arrays`."""
        self._seen.append(arrays["seen"])
        self._append(**{name: arrays[name] for name in self._columns})

    def table(
        self,
        windows: Callable[[Array], Sequence[Array]],
        special: Sequence[int],
        document_ids: Callable[[Array], Sequence[str]],
        texts: TokenTexts,
    ) -> pa.Table:
        """The contexts as SCHEMA, ordered by window; the arguments are those of ExampleCollector.examples."""
        found = self.arrays()
        seen = found["seen"][np.argsort(found["seen"][:, 0], kind="stable")]
        ids, lengths = seen[:, 0], seen[:, 1]
        order = np.lexsort((found["feature"], found["position"], found["window"]))
        window, feature, position, value = (found[n][order] for n in ("window", "feature", "position", "value"))
        borders = np.searchsorted(window, ids, "left"), np.searchsorted(window, ids, "right")
        first = _first(ids, lengths, self.width)
        rows = []
        about = zip(ids, first, *borders, windows(ids), document_ids(ids), strict=True)
        for window_id, start, a, b, tokens, document in about:
            all_ids = np.asarray(tokens)[start : start + self.width]
            kept = np.flatnonzero(~np.isin(all_ids, special))
            own = all_ids[kept]
            rows.append({
                "window_id": int(window_id),
                "document_id": document,
                "position": int(start + (kept[0] if len(kept) else 0)),
                "context_ids": own.astype(np.int32),
                "context_tokens": texts.sequence(own.tolist()),
                "feature": feature[a:b],
                "token": np.searchsorted(kept, position[a:b] - start).astype(np.int32),
                "activation": value[a:b],
            })  # fmt: skip
        return pa.Table.from_pylist(rows, SCHEMA)

    def _append(self, **columns: Array) -> None:
        for name, values in columns.items():
            self._columns[name].append(values)


def contexts_to_parquet(table: pa.Table) -> bytes:
    """The random contexts as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=256, compression="zstd")
    return bytes(sink.getvalue())


def _first(window_ids: Array, lengths: Array, width: int) -> Array:
    """[windows] int64, where the context of each begins: pseudo-random (splitmix64), the same whoever asks."""
    with np.errstate(over="ignore"):
        mixed = (window_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
    return (mixed % np.maximum(lengths - width + 1, 1).astype(np.uint64)).astype(np.int64)
