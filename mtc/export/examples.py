"""The stored examples of some features, out of examples.parquet."""

from __future__ import annotations

import io
from typing import Any

import pyarrow.parquet as pq

COLUMNS = (
    "feature", "kind", "quantile", "window_id", "position", "context_tokens", "context_activations", "peak_index",
)  # fmt: skip


def examples_of(
    parquet: bytes, first: int, last: int, top: int | None = None, samples: bool = True
) -> dict[int, list[dict[str, Any]]]:
    """The examples of features first..last, in the file's order: the `top` strongest, by default all that are stored,
    and with `samples` those that were drawn, by quantile. Other row groups are not read."""
    own = [("feature", ">=", first), ("feature", "<=", last)]
    chosen = [[*own, ("kind", "==", "top"), *([("rank", "<", top)] if top is not None else [])]]
    chosen += [[*own, ("kind", "==", "sample")]] if samples else []
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(io.BytesIO(parquet), columns=list(COLUMNS), filters=chosen).to_pylist():
        found.setdefault(row["feature"], []).append(row)
    return found
