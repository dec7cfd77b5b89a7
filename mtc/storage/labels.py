"""Labels of a run's features by a language model, labels.parquet, and what features are called all in all."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mtc.results import FeatureLabel
from mtc.storage.runs import RunDirectory

LABELS = "labels.parquet"
_INTERVAL = pa.struct([("value", pa.float64()), ("low", pa.float64()), ("high", pa.float64())])
SCHEMA = pa.schema({
    "feature": pa.int32(),
    "label": pa.string(),
    "reason": pa.string(),
    "machine_label": pa.string(),
    "first_label": pa.string(),
    "model": pa.string(),
    "prompts": pa.string(),
    "time": pa.string(),
    "prompt_tokens": pa.int64(),
    "answer_tokens": pa.int64(),
    "scores": pa.list_(pa.struct([
        ("labels", pa.string()), ("test", pa.string()), ("score", _INTERVAL), ("said_yes", pa.float64()),
        ("contexts", pa.int32()),
    ])),
    "not_scored": pa.string(),
})  # fmt: skip


def labels_to_parquet(rows: Sequence[FeatureLabel]) -> bytes:
    """labels.parquet: a row for each feature that has examples."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([row.model_dump() for row in rows], SCHEMA)
    pq.write_table(table, sink, row_group_size=512, compression="zstd")
    return bytes(sink.getvalue())


def parse_labels(parquet: bytes) -> list[FeatureLabel]:
    """The rows of labels.parquet."""
    return [FeatureLabel.model_validate(row) for row in pq.read_table(pa.BufferReader(parquet)).to_pylist()]


def read_labels(run: RunDirectory) -> list[FeatureLabel]:
    """What a language model made of the run's features; nothing if it was not asked."""
    return parse_labels(run.read(LABELS)) if run.exists(LABELS) else []


def read_features(run: RunDirectory, columns: Sequence[str] | None = None) -> pa.Table:
    """features.parquet, or some columns of it, in whose `label` is a language model's where it gave one. Raises
    RunError if there is no such file."""
    table = pq.read_table(pa.BufferReader(run.read("features.parquet")), columns=columns and list(columns))
    return with_labels(table, read_labels(run)) if "label" in table.column_names else table


def with_labels(table: pa.Table, rows: Sequence[FeatureLabel]) -> pa.Table:
    """The table of all features with a language model's labels where it gave some."""
    known = {row.feature: row.label for row in rows if row.label is not None}
    if not known:
        return table
    labels = [known.get(feature, label) for feature, label in enumerate(table["label"].to_pylist())]
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))
