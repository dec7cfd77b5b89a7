"""Example collection against a brute-force search over every activation."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtc.analysis.examples import EDGES, ExampleCollector
from mtc.analysis.token_sums import SparseActivations
from mtc.language_model import pack_windows
from mtc.text import TokenTexts
from tests.strangers.tokenizers_as_they_come import named

F, W, T = 6, 40, 12
SPECIAL = 1
TOKENS = TokenTexts(named(lambda i: f"<{i}>", 50))


@pytest.fixture(scope="module")
def data():
    """Window ids, token ids, which tokens count, activations; every third window is shorter by two special tokens."""
    rng = np.random.default_rng(0)
    activations = (rng.random((W, T, F)) * (rng.random((W, T, F)) < 0.3)).astype(np.float32)
    activations = np.round(activations, 1)  # many ties
    activations[..., 5] = 0
    counted = np.ones((W, T), bool)
    counted[:, 0] = False
    counted[::3, 9:] = False
    ids = np.where(counted, rng.integers(5, 50, (W, T)), SPECIAL).astype(np.int32)
    windows = rng.permutation(1000)[:W].astype(np.int64)
    return windows, ids, counted, np.where(counted[..., None], activations, np.float32(0))


def sparse(activations):
    """Of dense [tokens, features]."""
    feature, token = np.nonzero(activations.T)
    return SparseActivations(feature, token, activations[token, feature])


def add(collector, data, index):
    windows, ids, counted, activations = (column[index] for column in data)
    collector.add(windows, pack_windows(list(ids), [SPECIAL]), sparse(activations[counted]))


def collect(data, parts, minimum=0.2, limit=4):
    first, *rest = collectors = [ExampleCollector(F, limit, 3, 6, minimum) for _ in parts]
    for collector, part in zip(collectors, parts, strict=True):
        for some in np.array_split(part, 3):
            add(collector, data, some)
    for other in rest:
        first.merge_arrays(other.arrays())
    return first


def as_examples(collector, data):
    text = {int(w): ids for w, ids in zip(data[0], data[1], strict=True)}
    return collector.examples(
        lambda ids: [text[int(i)] for i in ids], [SPECIAL], lambda ids: [f"doc{i}" for i in ids], TOKENS
    )


def test_statistics_and_top_examples_equal_brute_force(data):
    windows, ids, counted, real = data
    collector = collect(data, [np.arange(W)])
    table = as_examples(collector, data).table().to_pylist()
    statistics = collector.statistics
    assert statistics.count.tolist() == (real > 0).sum((0, 1)).tolist()
    assert statistics.maximum.tolist() == real.max((0, 1)).tolist()
    np.testing.assert_allclose(statistics.total, real.astype(np.float64).sum((0, 1)))
    assert statistics.tokens == counted.sum()
    for f in range(F):
        bins = np.histogram(real[..., f][real[..., f] > 0], EDGES)[0]
        assert statistics.histogram[f].tolist() == bins.tolist()
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
            assert row["context_activations"] == real[w, inside, f].tolist()
            assert inside[row["peak_index"]] == p
            assert row["token_id"] == ids[w, p]
            assert row["token"] == f"<{ids[w, p]}>" == row["context_tokens"][row["peak_index"]]
            assert row["document_id"] == f"doc{row['window_id']}"
    assert [(r["feature"], r["kind"] == "sample", r["rank"]) for r in table] == sorted(
        (r["feature"], r["kind"] == "sample", r["rank"]) for r in table
    )


def test_any_partition_order_and_compaction_give_the_identical_file(data, monkeypatch):
    whole = as_examples(collect(data, [np.arange(W)]), data)
    order = np.random.default_rng(1).permutation(W)
    for pending in (0, 40, 1 << 20):  # how often candidates are thinned out in between
        monkeypatch.setattr("mtc.analysis.examples.PENDING_ROWS", pending)
        parts = as_examples(collect(data, np.array_split(order, 4)), data)
        assert parts.table().equals(whole.table())
        assert parts.to_parquet() == whole.to_parquet()


def test_samples_are_real_activations_and_uniform(data):
    windows, _, counted, activations = data
    rows = as_examples(collect(data, [np.arange(W)]), data).table().to_pylist()
    where = {w: i for i, w in enumerate(windows.tolist())}
    for row in (r for r in rows if r["kind"] == "sample"):
        i = where[row["window_id"]]
        assert counted[i, row["position"]]
        assert activations[i, row["position"], row["feature"]] == np.float32(row["activation"])
    big = ExampleCollector(1, 1, 400, 2, 0.0)
    values = np.linspace(0.001, 1, 20_000, dtype=np.float32).reshape(200, 100, 1)
    many = (np.arange(200), np.full((200, 100), 7, np.int32), np.ones((200, 100), bool), values)
    for part in np.array_split(np.arange(200), 7):
        add(big, many, part)
    rows = as_examples(big, many).table().to_pylist()
    sample = np.array([r["activation"] for r in rows if r["kind"] == "sample"])
    # Kolmogorov-Smirnov against the uniform distribution, at the 0.1 % level.
    gap = np.abs(np.sort(sample) - (np.arange(400) + 0.5) / 400).max()
    assert gap < 1.95 / np.sqrt(400)


def test_parquet_reads_one_feature_without_the_rest_and_as_a_dataset(tmp_path):
    from datasets import load_dataset

    values = np.random.default_rng(2).random((60, 5, 300)).astype(np.float32)
    data = (np.arange(60), np.full((60, 5), 7, np.int32), np.ones((60, 5), bool), values)
    collector = ExampleCollector(300, 30, 0, 2, 0.0)
    add(collector, data, np.arange(60))
    examples = as_examples(collector, data)
    content = examples.to_parquet()
    file = pq.ParquetFile(io.BytesIO(content))
    assert file.num_row_groups > 1
    groups = [file.metadata.row_group(i).column(0).statistics for i in range(file.num_row_groups)]
    assert sum(g.min <= 7 <= g.max for g in groups) <= 2
    one = pq.read_table(io.BytesIO(content), filters=[("feature", "==", 7)])
    assert one.num_rows == 30
    assert one.equals(examples.table([7]))
    (tmp_path / "examples.parquet").write_bytes(content)
    rows = load_dataset("parquet", data_files=str(tmp_path / "examples.parquet"), cache_dir=str(tmp_path))["train"]
    assert rows.num_rows == 9000
    assert rows[210]["context_tokens"][rows[210]["peak_index"]] == rows[210]["token"] == "<7>"


def test_windows_of_different_lengths_keep_their_contexts_apart(data):
    """Short windows next to long ones: what is packed beside a window is not its context."""
    windows, ids, counted, activations = data
    short = [ids[w, : T if counted[w, -1] else 9] for w in range(W)]
    packed = pack_windows(short, [SPECIAL])
    rows = np.concatenate([activations[w, : len(s)][counted[w, : len(s)]] for w, s in enumerate(short)])
    assert int(packed.trainable.sum()) == len(rows)
    collector = ExampleCollector(F, 4, 3, 6, 0.2)
    collector.add(windows, packed, sparse(rows))
    text = dict(zip(windows.tolist(), short, strict=True))
    found = collector.examples(lambda i: [text[int(w)] for w in i], [SPECIAL], lambda i: [f"doc{w}" for w in i], TOKENS)
    assert found.table().equals(as_examples(collect(data, [np.arange(W)]), data).table())
    assert torch.equal(packed.position_ids[packed.lengths[0] :][:1], torch.zeros(1, dtype=torch.int64))
