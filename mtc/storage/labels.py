"""Labels of a run's features by a language model, labels.parquet, and what features are called all in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class LabelTable:
    """labels.parquet for questions about single features: of a large dictionary the rows as objects take seconds."""

    def __init__(self, parquet: bytes):
        self._table = pq.read_table(pa.BufferReader(parquet))
        features = self._table["feature"].to_pylist()
        self._place = {feature: place for place, feature in enumerate(features)}
        labels = zip(features, self._table["label"].to_pylist(), strict=True)
        self.labels: dict[int, str] = {feature: label for feature, label in labels if label is not None}
        """The language model's labels by feature, where it gave one."""
        models = zip(features, self._table["model"].to_pylist(), strict=True)
        self.models: dict[int, str] = {feature: model for feature, model in models if feature in self.labels}
        """Who gave them."""

    def row(self, feature: int) -> FeatureLabel | None:
        """All about a feature's label; None if it was not to be labelled."""
        place = self._place.get(feature)
        return None if place is None else FeatureLabel.model_validate(self._table.slice(place, 1).to_pylist()[0])

    def detections(self) -> dict[int, float]:
        """How well the label that a feature has does in detection, by feature, where that was measured."""
        found = {}
        for feature, label, scores in zip(
            self._place, *(self._table[n].to_pylist() for n in ("label", "scores")), strict=True
        ):
            kind = "machine" if label is None else "model"
            for score in scores or ():
                if (score["labels"], score["test"]) == (kind, "detection"):
                    found[feature] = score["score"]["value"]
        return found


def read_features(run: RunDirectory, columns: Sequence[str] | None = None) -> pa.Table:
    """features.parquet, or some columns of it, in whose `label` is a language model's where it gave one. Raises
    RunError if there is no such file."""
    table = pq.read_table(pa.BufferReader(run.read("features.parquet")), columns=columns and list(columns))
    if "label" not in table.column_names or not run.exists(LABELS):
        return table
    return with_labels(table, LabelTable(run.read(LABELS)).labels)


def with_labels(table: pa.Table, known: Mapping[int, str]) -> pa.Table:
    """The table of all features with a language model's labels, by feature, where it gave some."""
    if not known:
        return table
    labels = [known.get(feature, label) for feature, label in enumerate(table["label"].to_pylist())]
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))
