"""What circuit-tracer's viewer shows of features: `layer_<N>.bin` for each layer and `index.json.gz`.

A layer's file has one record for each feature, one after the other: the length of what follows as 4 bytes,
little-endian, then gzipped JSON of the fields of circuit-tracer's `frontend/feature_models.py`. The index says by layer
the file's name and where each record begins, with the file's length last. The viewer fetches single records by their
bytes.

In version 0.5 it looks for them on the Hugging Face hub, in `features/` of the repository that a graph's `scan` names;
the versions of the source repository from April 2026 on also read a local directory (`serve(features_dir=)`).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mtc.analysis import read_feature
from mtc.export.examples import examples_of
from mtc.export.subject import Subject
from mtc.results import Feature
from mtc.storage import RunDirectory

BATCH = 128
"""Features whose examples are read at once."""
TOP, SAMPLES = 20, 5
"""Examples: the strongest, and of each fifth of the uniformly drawn ones."""
FIFTHS = 5
BINS = 40
DECIMALS = 4


def write_feature_files(subjects: Sequence[Subject], runs: Sequence[RunDirectory], directory: Path) -> None:
    """Write the features of those layers that were analysed; `runs` are the subjects', in their order."""
    index = {}
    for subject, run in zip(subjects, runs, strict=True):
        if subject.analysis is not None:
            directory.mkdir(exist_ok=True)
            name = f"layer_{subject.layer}.bin"
            index[str(subject.layer)] = {"filename": name, "offsets": _write_layer(subject, run, directory / name)}
    if index:
        packed = gzip.compress(json.dumps(index).encode(), mtime=0)
        (directory / "index.json.gz").write_bytes(packed)


def _write_layer(subject: Subject, run: RunDirectory, path: Path) -> list[int]:
    """Where each record begins, and the file's length."""
    assert subject.analysis is not None
    edges = np.array(subject.analysis.activation_edges)
    examples, table = run.read("examples.parquet"), pq.read_table(io.BytesIO(run.read("features.parquet")))
    offsets = [0]
    with path.open("wb") as file:
        for first in range(0, subject.prefix, BATCH):
            last = min(first + BATCH, subject.prefix) - 1
            shown = examples_of(examples, first, last, top=TOP)
            for j in range(first, last + 1):
                about = describe_feature(read_feature(table, j), shown.get(j, []), edges)
                about = {"transcoder_id": subject.run_id, "index": j} | about
                packed = gzip.compress(json.dumps(about, allow_nan=False).encode(), mtime=0)
                offsets.append(offsets[-1] + file.write(len(packed).to_bytes(4, "little") + packed))
    return offsets


def describe_feature(feature: Feature, examples: list[dict[str, Any]], edges: np.ndarray) -> dict[str, Any]:
    """A record's fields but the first two. A feature that never fired has no examples and an empty histogram."""
    histogram, percentiles = spread(np.array(feature.histogram), edges, feature.max_activation)
    return {
        "examples_quantiles": _quantiles(examples),
        "top_logits": [effect.token for effect in feature.positive_logits or ()],
        "bottom_logits": [effect.token for effect in feature.negative_logits or ()],
        "act_min": 0.0,
        "act_max": round(feature.max_activation, DECIMALS),
        "quantile_values": percentiles.round(DECIMALS).tolist(),
        "histogram": histogram.round(DECIMALS).tolist(),
        "activation_frequency": feature.density,
    }


def spread(counts: np.ndarray, edges: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """From counts [bins] between edges [bins + 1]: counts [BINS] of equal bins from 0 to the largest activation, and
    the 1st to 99th percentile. Inside a bin the activations are taken to be evenly spread."""
    (filled,) = counts.nonzero()
    if not len(filled):
        return np.zeros(0), np.zeros(0)
    inside = slice(filled[0], filled[-1] + 1)
    at = edges[filled[0] : filled[-1] + 2].astype(np.float64)
    at[0] = 0.0 if filled[0] == 0 else at[0]  # the outer bins take what lies beyond
    at[-1] = max(largest, at[-2])
    below = np.concatenate([[0], counts[inside].cumsum()])
    histogram = np.diff(np.interp(np.linspace(0, at[-1], BINS + 1), at, below))
    return histogram, np.interp(np.arange(1, 100) / 100 * below[-1], below, at)


def _quantiles(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    top = [row for row in examples if row["kind"] == "top"]
    seen = {(row["window_id"], row["position"]) for row in top}
    found = [{"quantile_name": "Top activations", "examples": [_example(row, repeated=False) for row in top]}]
    for fifth in reversed(range(FIFTHS)):
        drawn = (row for row in examples if row["kind"] == "sample")
        own = [row for row in drawn if min(int(row["quantile"] * FIFTHS), FIFTHS - 1) == fifth]
        name = f"Percentiles {100 * fifth // FIFTHS} to {100 * (fifth + 1) // FIFTHS}"
        shown = [_example(row, (row["window_id"], row["position"]) in seen) for row in own[:SAMPLES]]
        found.append({"quantile_name": name, "examples": shown})
    return [each for each in found if each["examples"]]


def _example(row: dict[str, Any], repeated: bool) -> dict[str, Any]:
    return {
        "tokens_acts_list": [round(value, DECIMALS) for value in row["context_activations"]],
        "train_token_ind": row["peak_index"],
        "is_repeated_datapoint": repeated,
        "tokens": row["context_tokens"],
    }
