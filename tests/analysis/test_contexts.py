"""Random contexts against every activation of the text that they are cut from."""

import numpy as np
import pytest

from mtc.analysis.contexts import ContextCollector, choose_windows, contexts_to_parquet
from mtc.analysis.token_sums import SparseActivations
from mtc.language_model import pack_windows
from mtc.text import TokenTexts
from tests.strangers.tokenizers_as_they_come import named

F, W, T, WIDTH, BOS = 5, 60, 16, 7, 1
TEXTS = TokenTexts(named(lambda i: f"<{i}>", 50))


@pytest.fixture(scope="module")
def text():
    """Window ids, token ids (the first is special, some windows are shorter than a context), dense activations."""
    rng = np.random.default_rng(0)
    windows = rng.permutation(1000)[:W].astype(np.int64)
    ids = [rng.integers(5, 50, 4 if i % 9 == 0 else T).astype(np.int32) for i in range(W)]
    for own in ids:
        own[0] = BOS
    dense = [(rng.random((len(own), F)) * (rng.random((len(own), F)) < 0.3)).astype(np.float32) for own in ids]
    for own in dense:
        own[0] = 0
    return windows, ids, dense


def collect(text, chosen, parts):
    windows, ids, dense = text
    collectors = []
    for part in parts:
        collector = ContextCollector(chosen, WIDTH)
        for some in np.array_split(part, 2):
            rows = np.concatenate([dense[i][1:] for i in some])
            feature, token = np.nonzero(rows.T)
            entries = SparseActivations(feature, token, rows[token, feature])
            collector.add(windows[some], pack_windows([ids[i] for i in some], [BOS]), entries)
        collectors.append(collector)
    for other in collectors[1:]:
        collectors[0].merge_arrays(other.arrays())
    by_id = dict(zip(windows.tolist(), ids, strict=True))
    return collectors[0].table(lambda w: [by_id[int(i)] for i in w], [BOS], lambda w: [f"d{i}" for i in w], TEXTS)


def test_a_context_has_all_that_fires_in_it_and_nothing_else(text):
    windows, ids, dense = text
    chosen = choose_windows(windows, 40, seed=3)
    table = collect(text, chosen, [np.arange(W)])
    assert table["window_id"].to_pylist() == chosen.tolist(), "each once, in order"
    index, begun = {int(w): i for i, w in enumerate(windows)}, set()
    for row in table.to_pylist():
        own = index[row["window_id"]]
        first, length = row["position"], len(row["context_ids"])
        begun.add(first)
        assert row["context_ids"] == ids[own][first : first + length].tolist() and BOS not in row["context_ids"]
        assert "".join(row["context_tokens"]) == "".join(f"<{t}>" for t in row["context_ids"])
        assert length in (WIDTH, WIDTH - 1) or length == len(ids[own]) - 1 < WIDTH, "less only by what is special"
        found = np.zeros((length, F), np.float32)
        found[row["token"], row["feature"]] = row["activation"]
        np.testing.assert_array_equal(found, dense[own][first : first + length])
        assert row["document_id"] == f"d{row['window_id']}"
    assert len(begun) > 4, "they do not all begin at the same place"


def test_who_collects_what_does_not_matter(text):
    chosen = choose_windows(text[0], 30, seed=1)
    whole = contexts_to_parquet(collect(text, chosen, [np.arange(W)]))
    parts = np.array_split(np.random.default_rng(1).permutation(W), 4)
    assert contexts_to_parquet(collect(text, chosen, parts)) == whole
    assert collect(text, choose_windows(text[0], 0, seed=1), parts).num_rows == 0


def test_windows_are_drawn_once_and_by_the_seed(text):
    windows = np.r_[text[0], text[0]]
    first = choose_windows(windows, 20, seed=5)
    assert len(set(first.tolist())) == 20 and set(first) <= set(windows)
    assert (
        first.tolist() == choose_windows(windows[::-1], 20, seed=5).tolist() != choose_windows(windows, 20, 6).tolist()
    )
    assert len(choose_windows(windows, 10**6, seed=5)) == W
