"""Rules against values worked out by hand."""

import re
from typing import Any

import numpy as np
import pytest

from mtc.analysis.copies import FoundCopies
from mtc.analysis.rules import RULES
from mtc.config import RunConfig
from mtc.results import Analysis, StraightLine
from tests.report_example import (
    NONE,
    bare_analysis,
    make_analysis,
    make_config,
    make_evaluation,
    make_examples,
    make_history,
    make_massive_sums,
    make_statistics,
)


def findings(config: RunConfig | None = None, **parts: Any) -> tuple[Analysis, dict[str, bool]]:
    analysis, _ = make_analysis(config, **parts)
    return analysis, {i.rule: i.met for i in analysis.insights}


def test_rules() -> None:
    analysis, met = findings()
    assert met == {
        "nested prefixes": False, "reconstruction": False, "direction": False, "rare tokens": True, "interval": False,
        "documents": False, "sparsity": True, "empty tokens": True, "dead features": True, "dead counter": False,
        "dense features": True, "loss recovered": True, "ablation gap": False, "loss measured": False,
        "still improving": True, "nested features": False, "judged features": False, "absorption": False,
        "few samples": False, "held-out text": False, "massive tokens": False, "straight line": False,
        "overfitting": False, "copies": False,
    }  # fmt: skip
    values = {i.rule: i.value for i in analysis.insights}
    expected = {
        "nested prefixes": 0.6 - 0.4512345, "direction": 0.7512, "rare tokens": 0.91 / 0.4512345,
        "interval": (0.02345678 + 0.0312345) / 0.4512345, "documents": 9, "sparsity": 0.1, "empty tokens": 0.02,
        "dead features": 0.2, "dense features": 0.2, "loss recovered": 0.74385, "ablation gap": 2.0,
        "nested features": 3 / 3,  # 6, 7 and 8; 4, 5 and 9 fired on fewer than 10 tokens
        "judged features": 3 / 6, "absorption": 1 / 10, "few samples": 3 / 8,
        "massive tokens": 0, "straight line": 1 - 0.4512345 / 0.62, "copies": 0,
        "overfitting": 0.4512345 / np.mean([0.9 - 1e-5 * 256 * i for i in range(40, 50)]) - 1,
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(value), name


def test_recommendations_are_the_rules_that_are_met() -> None:
    analysis, met = findings()
    assert [r.rule for r in analysis.recommendations] == [name for name, state in met.items() if state]
    for r in analysis.recommendations:
        assert r.field
        part, name = r.field.split(".")
        assert getattr(getattr(analysis.config, part), name, None) is not None
        assert f"`{r.field}` is " in r.text
    texts = {r.rule: r.text for r in analysis.recommendations}
    assert "(`transcoder.k` is 4)" in texts["dense features"]
    for finding in (*analysis.insights, *analysis.recommendations):
        assert re.search(r"\d", finding.text)
    for rule in RULES:
        part, name = rule.field.split(".")
        assert hasattr(getattr(analysis.config, part), name), rule.field
        # The condition names the threshold that is compared.
        shown = {f"{rule.threshold:g}", f"{100 * rule.threshold:g} %"}
        assert any(re.search(rf"[<>] {re.escape(s)}( |$|\b)", rule.condition + " ") for s in shown), rule.name


def test_rules_follow_the_measurement() -> None:
    few = make_config(analysis={"num_tokens": 2000}, transcoder={"dead_after_tokens": 8193})
    evaluation = make_evaluation([4, 10], loss=False, intervals=False)
    _, met = findings(few, history=make_history(50, slope=1e-5), evaluation=evaluation)
    for rule in ("held-out text", "dead counter", "getting worse", "loss measured", "documents"):
        assert met[rule], rule
    assert not {"still improving", "loss recovered", "ablation gap", "interval"} & set(met)

    evaluation = make_evaluation([4, 10])
    assert evaluation.loss
    loss = evaluation.loss.model_copy(update={"ce_zero": 2.99})
    wide = [(0.1, 0.9), (0.4, 0.5)]
    changes = {"loss": loss, "fvu_interval": wide, "fvu": [0.55, 0.545], "cosine": [0.7, 0.69]}
    _, met = findings(evaluation=evaluation.model_copy(update=changes))
    assert met["ablation gap"]
    assert met["direction"]
    assert met["reconstruction"]
    assert met["nested prefixes"]
    assert not met["interval"]  # 0.1 / 0.545
    assert "loss recovered" not in met  # a share of nothing
    _, met = findings(evaluation=evaluation.model_copy(update={"fvu_interval": [(0.1, 0.9), (0.4, 0.51)]}))
    assert met["interval"]  # 0.11 / 0.4512
    _, met = findings(make_config(transcoder={"activation": "jumprelu"}))
    assert met["sparsity as trained"]
    assert "sparsity" not in met  # nothing was calibrated
    analysis, met = findings(make_config(transcoder={"activation": "topk"}))
    assert met["fewer than k"]
    assert not {"sparsity", "sparsity as trained"} & set(met)
    assert {r.rule: r.field for r in analysis.recommendations}["fewer than k"] == "optimizer.lr"


def test_rules_about_what_the_headline_figure_is_held_against() -> None:
    evaluation = make_evaluation([4, 10], massive=True)
    copies = FoundCopies(800, np.array([-1, -1, -1, 1, -1, -1, 1, -1, -1, -1]))
    line = StraightLine(fvu=0.49, added=1 - 0.4512345 / 0.49, all_tokens_fvu=0.4, all_tokens_added=0.372, folds=5)
    history = [row | {"fvu": [0.1, 0.2]} for row in make_history(50)]
    analysis, met = findings(
        evaluation=evaluation.model_copy(update={"line": line}), massive=make_massive_sums(), copies=copies,
        history=history,
    )  # fmt: skip
    for rule in ("massive tokens", "straight line", "overfitting", "copies"):
        assert met[rule], rule
    assert met["sparsity"]  # L0 of all tokens, 6.3 where 4 was asked
    texts = {r.rule: r.text for r in analysis.recommendations}
    assert f"{analysis.config.model.name}, layer {analysis.config.model.layer}" in texts["massive tokens"]
    assert "20 held-out tokens (2 %)" in texts["massive tokens"]
    assert "hold 51.83 % of the variance and 1.31 % of the squared error" in texts["massive tokens"]
    assert "0.4512 without them, the headline figure, and 0.2512 with them" in texts["massive tokens"]
    assert "features add 7.911 %" in texts["straight line"]
    assert "`transcoder.skip` is no" in texts["straight line"]
    assert "is 0.4512, its batch FVU 0.2 over" in texts["overfitting"]
    assert "125.6 % more" in texts["overfitting"]
    assert "2 of 10 features (20 %)" in texts["copies"]
    skip = make_config(transcoder={"skip": True})
    with_skip, met = findings(skip, evaluation=evaluation.model_copy(update={"line": line}))
    assert "straight line" not in met
    assert {r.rule: r.field for r in with_skip.recommendations}["features beside the skip connection"] == "transcoder.k"

    assert analysis.summary.massive_features == 1
    assert analysis.massive_indices == (8,)
    assert 8 not in [f.feature for f in analysis.top_features]
    assert [f.feature for f in analysis.massive_features] == [8]
    assert analysis.copies is not None
    assert [(c.feature, c.copies) for c in analysis.copies.copied] == [(1, (3, 6))]


def test_nothing_measured_nothing_said() -> None:
    analysis, _ = bare_analysis()
    assert {i.rule for i in analysis.insights} == {
        "reconstruction", "documents", "sparsity", "dead features", "dead counter", "dense features", "loss measured",
        "held-out text", "massive tokens", "copies",
    }  # fmt: skip
    silent, met = findings(statistics=make_statistics(NONE), examples=make_examples(NONE))
    assert silent.summary.few_samples_fraction is None
    assert "few samples" not in met


def test_trend_is_the_fitted_line() -> None:
    history = make_history(100)
    noise = np.random.default_rng(0).normal(0, 0.002, 100)
    for row, e in zip(history, noise, strict=True):
        row["fvu"] = [0.0, row["fvu"][-1] + e]
    trend = make_analysis(history=history)[0].summary.trend
    x = np.array([r["tokens"] for r in history[80:]])
    y = np.array([r["fvu"][1] for r in history[80:]])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    span = (x[-1] - x[0]) / y.mean()
    assert trend is not None
    assert trend.rows == 20
    assert trend.fall == pytest.approx(-slope * span)
    assert trend.standard_error == pytest.approx(np.sqrt(covariance[0, 0]) * span)
    assert make_analysis(history=make_history(24))[0].summary.trend is None
