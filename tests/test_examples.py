"""Example collection against a brute-force search over every activation."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtc.examples import ExampleCollector, to_parquet
from mtc.work import pack_windows

F, W, T = 6, 40, 12


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    activations = (rng.random((W, T, F)) * (rng.random((W, T, F)) < 0.3)).astype(np.float32)
    activations = np.round(activations, 1)  # many ties
    activations[..., 5] = 0
    ids = rng.integers(5, 50, (W, T))
    counted = np.ones((W, T), bool)
    counted[:, 0] = False
    counted[::3, 9:] = False
    windows = rng.permutation(1000)[:W].astype(np.int64)
    return windows, ids, counted, activations


def collect(data, parts, minimum=0.2):
    collectors = []
    for index in parts:
        collector = ExampleCollector(F, 4, 3, 6, minimum)
        for window in np.array_split(index, 3):
            collector.add(*(column[window] for column in data))
        collectors.append(collector)
    first, *rest = collectors
    for other in rest:
        first.merge_bytes(other.to_bytes())
    return first


def as_table(collector):
    return collector.table(lambda ids: [f"doc{i}" for i in ids], lambda token: f"<{token}>")


def test_statistics_and_top_examples_equal_brute_force(data):
    windows, ids, counted, activations = data
    collector = collect(data, [np.arange(W)])
    table = as_table(collector).to_pylist()
    real = np.where(counted[..., None], activations, 0)
    assert collector.statistics.count.tolist() == (real > 0).sum((0, 1)).tolist()
    assert collector.statistics.maximum.tolist() == real.max((0, 1)).tolist()
    np.testing.assert_allclose(collector.statistics.total, real.astype(np.float64).sum((0, 1)))
    assert collector.statistics.tokens == counted.sum()
    for f in range(F):
        peaks = []
        for w in range(W):
            p = int(real[w, :, f].argmax())  # the first of equal maxima
            if real[w, p, f] >= np.float32(0.2):
                peaks.append((-real[w, p, f], windows[w], p, w))
        expected = sorted(peaks)[:4]
        rows = [r for r in table if r["feature"] == f and r["kind"] == "top"]
        assert [(r["window_id"], r["position"]) for r in rows] == [(w, p) for _, w, p, _ in expected]
        for rank, (row, (value, _, p, w)) in enumerate(zip(rows, expected, strict=True)):
            inside = [q for q in range(max(0, p - 3), min(T, p + 4)) if counted[w, q]]
            assert row["rank"] == rank
            assert row["activation"] == -value
            assert row["context_ids"] == ids[w, inside].tolist()
            assert row["context_activations"] == activations[w, inside, f].tolist()
            assert inside[row["peak_index"]] == p
            assert row["token"] == f"<{ids[w, p]}>" == row["context_tokens"][row["peak_index"]]
            assert row["document_id"] == f"doc{row['window_id']}"
    assert [(r["feature"], r["kind"] == "sample", r["rank"]) for r in table] == sorted(
        (r["feature"], r["kind"] == "sample", r["rank"]) for r in table
    )


def test_any_partition_and_order_gives_the_identical_table(data):
    whole = as_table(collect(data, [np.arange(W)]))
    order = np.random.default_rng(1).permutation(W)
    assert as_table(collect(data, np.array_split(order, 4))).equals(whole)


def test_samples_are_real_activations_and_uniform(data):
    windows, _, counted, activations = data
    rows = [r for r in as_table(collect(data, [np.arange(W)])).to_pylist() if r["kind"] == "sample"]
    where = {w: i for i, w in enumerate(windows.tolist())}
    for row in rows:
        i = where[row["window_id"]]
        assert counted[i, row["position"]]
        assert activations[i, row["position"], row["feature"]] == np.float32(row["activation"])
    big = ExampleCollector(1, 1, 400, 2, 0.0)
    values = np.linspace(0.001, 1, 20_000, dtype=np.float32).reshape(200, 100, 1)
    big.add(np.arange(200), np.zeros((200, 100), int), np.ones((200, 100), bool), values)
    sample = np.array([r["activation"] for r in as_table(big).to_pylist() if r["kind"] == "sample"])
    # Kolmogorov-Smirnov against the uniform distribution, at the 0.1 % level.
    gap = np.abs(np.sort(sample) - (np.arange(400) + 0.5) / 400).max()
    assert gap < 1.95 / np.sqrt(400)


def test_parquet_reads_one_feature_without_the_rest():
    collector = ExampleCollector(300, 30, 0, 2, 0.0)
    values = np.random.default_rng(2).random((60, 5, 300)).astype(np.float32)
    collector.add(np.arange(60), np.ones((60, 5), int), np.ones((60, 5), bool), values)
    data = to_parquet(as_table(collector))
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.num_row_groups > 1
    groups = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
    assert sum(g.min <= 7 <= g.max for g in groups) == 1
    assert pq.read_table(io.BytesIO(data), filters=[("feature", "==", 7)]).num_rows == 30


def test_packed_windows_give_what_rectangles_give(data):
    """Long and short windows mixed: rectangles stay small, examples are the same."""
    windows, ids, counted, activations = data
    lengths = np.where(counted[:, -1], T, 9)
    expected = collect(data, [np.arange(W)])
    rows = [ids[w, :n].astype(np.int32) for w, n in enumerate(lengths)]
    packed = pack_windows(rows, [])
    trainable = np.concatenate([counted[w, :n] for w, n in enumerate(lengths)])
    packed = packed._replace(trainable=torch.from_numpy(trainable))
    sparse = np.concatenate([activations[w, :n] for w, n in enumerate(lengths)])[trainable]
    collector = ExampleCollector(F, 4, 3, 6, 0.2)
    sizes = []
    add = collector.add
    collector.add = lambda w, i, c, a: (sizes.append(i.size), add(w, i, c, a))
    collector.add_packed(windows, packed, sparse)
    assert as_table(collector).equals(as_table(expected))
    assert len(sizes) > 1
    assert max(sizes) <= len(packed.input_ids)
