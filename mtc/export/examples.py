"""The stored examples of some features, out of examples.parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

COLUMNS = (
    "feature", "kind", "quantile", "window_id", "position", "context_tokens", "context_activations", "peak_index",
)  # fmt: skip


def examples_of(parquet: bytes, first: int, last: int, kinds: Sequence[str]) -> dict[int, list[dict[str, Any]]]:
    """The examples of features first..last, in the file's order: `top` strongest first, `sample` by quantile. Other row
    groups are not read."""
    chosen = [("feature", ">=", first), ("feature", "<=", last), ("kind", "in", list(kinds))]
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(io.BytesIO(parquet), columns=list(COLUMNS), filters=chosen).to_pylist():
        found.setdefault(row["feature"], []).append(row)
    return found
