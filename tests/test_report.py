"""The analysis against figures worked out by hand, and the report against the analysis."""

import io
import json
import re
from typing import Any

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
import torch

from mtc.analysis import Analysis, RunFacts, analyse
from mtc.config import RunConfig, load_preset
from mtc.evaluation import Evaluation, LossRecovered
from mtc.examples import FeatureStatistics
from mtc.report import report_names, write_report
from mtc.report.format import context, escape, number, percent, token
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

GROUPS = (4, 6)
TOKENS = 1000
HOSTILE = ["|", "`code`", "\n", "<script>alert(1)</script>", "**", "a|b\n| c |", "$x$", "\u202eevil", " "]
COUNTS = [500, 40, 0, 7, 1, 0, 99, 100, 101, 3]  # features 2 and 5 are silent, 0 and 8 are dense
SAMPLES = [10, 10, 0, 7, 1, 0, 10, 10, 10, 0]  # feature 9 is weaker than min_activation


def make_config(**overrides: Any) -> RunConfig:
    transcoder = {"group_sizes": list(GROUPS), "k": 4, "dead_after_tokens": 500} | overrides.pop("transcoder", {})
    analysis = {"num_tokens": 1000, "max_per_feature": 10, "num_top_features": 9} | overrides.pop("analysis", {})
    return load_preset("tiny", {"transcoder": transcoder, "analysis": analysis, **overrides})


def make_transcoder(groups: tuple[int, ...] = GROUPS) -> MatryoshkaTranscoder:
    transcoder = MatryoshkaTranscoder(TranscoderShape(8, 6, groups, 4, "rms"))
    rows = torch.arange(1, sum(groups) + 1).float()
    transcoder.W_dec.data[:, 0] = rows  # row j has norm j + 1
    transcoder.threshold.fill_(0.25)
    transcoder.tokens_since_fired[:3] = torch.tensor([499, 500, 501])
    return transcoder


def make_statistics(counts: list[int] = COUNTS) -> FeatureStatistics:
    count = np.array(counts, np.int64)
    maximum = np.where(count > 0, 1 + np.arange(len(count)) / 2, 0).astype(np.float32)
    return FeatureStatistics(count, maximum, count * 0.5, TOKENS)


def make_examples(samples: list[int] = SAMPLES, tokens: list[str] = HOSTILE) -> pa.Table:
    """Sample r of a feature peaks on token 0, except that r = 1 peaks on token `feature % len(tokens)`; r = 2 too."""
    rows = []
    for feature, n in enumerate(samples):
        for kind, many in (("top", n), ("sample", min(n, 2))):
            for rank in range(many):
                i = feature % len(tokens) if rank in (1, 2) else 0
                rows.append({
                    "feature": feature, "kind": kind, "rank": rank, "activation": 1 + feature / 2 - rank / 50,
                    "quantile": None if kind == "top" else 0.5, "window_id": rank, "document_id": f"doc|{rank}",
                    "position": 3, "token_id": i, "token": tokens[i], "context_ids": [7, i, 8],
                    "context_tokens": ["the", tokens[i], " of|"], "context_activations": [0.0, 1.0, 0.0],
                    "peak_index": 1,
                })  # fmt: skip
    types = {
        "feature": pa.int32(), "kind": pa.string(), "rank": pa.int32(), "activation": pa.float32(),
        "quantile": pa.float32(), "window_id": pa.int64(), "document_id": pa.string(), "position": pa.int32(),
        "token_id": pa.int32(), "token": pa.string(), "context_ids": pa.list_(pa.int32()),
        "context_tokens": pa.list_(pa.string()), "context_activations": pa.list_(pa.float32()),
        "peak_index": pa.int32(),
    }  # fmt: skip
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def make_evaluation(prefixes: list[int], loss: bool = True) -> Evaluation:
    n = len(prefixes)
    measured = LossRecovered(
        tokens=400, ce_clean=3.0, ce_zero=5.0, ce_mean=4.0, ce_spliced=[3.5] * n, kl=[0.321] * n,
        recovered_zero=[0.75] * n, recovered_mean=[0.5] * n,
    )  # fmt: skip
    fvu = [0.6, 0.4512345, 0.449][:n]
    return Evaluation(
        tokens=TOKENS, prefixes=prefixes, fvu=fvu, l0=[4.4] * n, never_fired=2, loss=measured if loss else None
    )


def make_history(rows: int, slope: float = -1e-5, prefixes: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1, "tokens": (i + 1) * 256, "loss": 1.0, "fvu": [0.9 + slope * i * 256] * prefixes, "l0": 4.0,
            "dead": i // 10, "lr": 1e-3, "tokens_per_second": 1e4, "gradient_norm": 0.5,
        }
        for i in range(rows)
    ]  # fmt: skip


def make_facts() -> RunFacts:
    return RunFacts(
        run_id="run_1", steps=32, trained_tokens=8192, data_name="addresses", documents={"train": 200, "heldout": 49},
        windows={"train": 900, "heldout": 50}, language_model_dtype="float32", devices=("cpu",), num_trainers=2,
        num_model_actors=1, seconds={"train": 12.5}, versions={"torch": "2.13.0"},
    )  # fmt: skip


def make_analysis(config: RunConfig | None = None, **parts: Any) -> Analysis:
    transcoder = parts.get("transcoder", make_transcoder())
    return analyse(
        config or make_config(),
        transcoder,
        parts.get("evaluation", make_evaluation(list(transcoder.prefixes))),
        parts.get("statistics", make_statistics()),
        parts.get("examples", make_examples()),
        parts.get("history", make_history(50)),
        parts.get("facts", make_facts()),
    )


def cells(line: str) -> list[str]:
    return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table as rows of cells, its header first; fails if a row has another number of cells than the header."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in markdown.split("\n"):
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            if not set(line) <= set("|- "):
                found[-1].append(cells(line))
        previous = line
    for rows in found:
        assert {len(r) for r in rows} == {len(rows[0])}
    return found


def test_summary_counts() -> None:
    s = make_analysis().summary
    assert (s.total_features, s.silent_features, s.silent_fraction) == (10, 2, 0.2)
    assert (s.dead_features, s.dead_fraction) == (2, 0.2)  # counters 500 and 501 of 500
    assert (s.features_with_samples, s.total_samples, s.uniform_examples) == (7, 58, 13)
    assert s.average_samples == pytest.approx(58 / 7)
    assert s.few_samples_fraction == 3 / 8  # features 3, 4 and 9 of the eight that fired
    assert (s.dense_features, s.dense_fraction) == (2, 0.2)  # 100 of 1,000 tokens is not more than 10 %
    assert s.dense_activation_share == pytest.approx(601 / sum(COUNTS))
    assert s.explained_variance == pytest.approx((0.4, 0.5487655))


def test_features_and_weights() -> None:
    analysis = make_analysis()
    transcoder = make_transcoder()
    assert [f.count for f in analysis.features] == COUNTS
    assert [f.samples for f in analysis.features] == SAMPLES
    assert [f.group for f in analysis.features] == [0] * 4 + [1] * 6
    assert [f.mean_activation for f in analysis.features] == [0.5 if c else 0 for c in COUNTS]
    assert [f.density for f in analysis.features] == [c / TOKENS for c in COUNTS]
    assert [t.model_dump() for t in analysis.features[3].top_tokens] == [
        {"token_id": 0, "token": "|", "count": 5},
        {"token_id": 3, "token": HOSTILE[3], "count": 2},
    ]
    assert [f.feature for f in analysis.top_features] == [9, 8, 7, 6, 4, 3, 1, 0]
    assert analysis.top_features[0].top_token is None
    w = analysis.weights
    assert w.decoder_norm.mean == pytest.approx(5.5)
    assert w.decoder_norm.std == pytest.approx(np.arange(1, 11).std())
    assert (w.decoder_norm.min, w.decoder_norm.max) == (1, 10)
    assert [g.decoder_norm for g in w.groups] == pytest.approx([2.5, 7.5])
    assert [g.silent_features for g in w.groups] == [1, 1]
    assert w.encoder.std == pytest.approx(float(transcoder.W_enc.detach().double().std(correction=0)), rel=1e-5)
    assert w.encoder_norm.mean == pytest.approx(1)


def test_equal_token_counts_come_in_order_of_strength() -> None:
    examples = make_examples([0, 3], ["weak", "strong"])
    rows = examples.to_pylist()
    rows[1]["token_id"], rows[1]["token"] = 5, "middle"
    top = make_analysis(examples=pa.Table.from_pylist(rows, schema=examples.schema)).features[1].top_tokens
    assert [t.token for t in top] == ["weak", "middle", "strong"]


def test_another_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="statistics of 3 features"):
        make_analysis(statistics=make_statistics([1, 2, 3]))
    with pytest.raises(ValueError, match="prefixes"):
        make_analysis(evaluation=make_evaluation([3, 10]))


def findings(analysis: Analysis) -> dict[str, bool]:
    return {i.rule: i.met for i in analysis.insights}


def test_rules() -> None:
    analysis = make_analysis()
    assert findings(analysis) == {
        "nested prefixes": False, "reconstruction": False, "sparsity": True, "dead features": True,
        "dead counter": False, "dense features": True, "loss recovered": True, "loss measured": False,
        "still improving": True, "few samples": False, "held-out text": False,
    }  # fmt: skip
    assert [r.rule for r in analysis.recommendations] == [i.rule for i in analysis.insights if i.met]
    fields = {r.rule: r.field for r in analysis.recommendations}
    assert fields["dead features"] == "transcoder.aux_coefficient"
    assert all(r.field in r.text for r in analysis.recommendations if r.field)
    for finding in (*analysis.insights, *analysis.recommendations):
        assert re.search(r"\d", finding.text)
    values = {i.rule: i.value for i in analysis.insights}
    assert values["nested prefixes"] == pytest.approx(0.6 - 0.4512345)
    assert values["sparsity"] == pytest.approx(0.1)
    assert values["loss recovered"] == 0.75


def test_rules_follow_the_measurement() -> None:
    few = make_config(analysis={"num_tokens": 2000}, transcoder={"dead_after_tokens": 8193})
    met = findings(make_analysis(few, history=make_history(50, slope=1e-5), evaluation=make_evaluation([4, 10], False)))
    assert met["held-out text"]
    assert met["dead counter"]
    assert met["getting worse"]
    assert met["loss measured"]
    assert "still improving" not in met
    assert "loss recovered" not in met


def test_trend_is_the_fitted_line() -> None:
    history = make_history(100)
    noise = np.random.default_rng(0).normal(0, 0.002, 100)
    for row, e in zip(history, noise, strict=True):
        row["fvu"] = [0.0, row["fvu"][-1] + e]
    trend = make_analysis(history=history).summary.trend
    x = np.array([r["tokens"] for r in history[80:]])
    y = np.array([r["fvu"][1] for r in history[80:]])
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    span = (x[-1] - x[0]) / y.mean()
    assert trend is not None
    assert trend.rows == 20
    assert trend.fall == pytest.approx(-slope * span)
    assert trend.standard_error == pytest.approx(np.sqrt(covariance[0, 0]) * span)
    assert make_analysis(history=make_history(24)).summary.trend is None


def test_markdown_and_json_agree() -> None:
    analysis = make_analysis()
    files = write_report(analysis, make_examples(), make_history(50))
    assert tuple(files) == report_names(1)
    data = json.loads(files["layer1_analysis_report.json"])
    assert Analysis.model_validate(data) == analysis
    markdown = files["layer1_analysis_report.md"].decode()
    for i, title in enumerate(
        ["Executive summary", "Training configuration", "Model weight analysis", "Top features by activation",
         "Feature analysis", "Key insights", "Recommendations", "Files generated"], 1,
    ):  # fmt: skip
        assert f"\n## {i}. {title}\n" in markdown
    for name in files:
        if name.endswith(".png"):
            assert f"]({name})" in markdown
    found = tables(markdown)
    summary, s = dict(found[0][1:]), data["summary"]
    assert summary["Total features"] == number(s["total_features"]) == "10"
    assert summary["Silent features (did not fire on the analysed held-out tokens)"] == number(s["silent_features"])
    assert summary["Dead fraction"] == percent(s["dead_fraction"]) == "20 %"
    assert summary["Average samples per feature (of those with samples)"] == number(s["average_samples"]) == "8.286"
    assert [row[1] for row in found[1][1:]] == [number(v) for v in s["fvu"]] == ["0.6", "0.4512"]
    assert [row[6] for row in found[1][1:]] == [number(v) for v in s["loss"]["kl"]]
    setting = dict(found[2][1:])
    assert setting["Configuration fingerprint"] == data["training"]["fingerprint"] == analysis.config.fingerprint()
    assert setting["Learning rate"] == number(data["config"]["optimizer"]["lr"])
    assert setting["Inference threshold"] == "0.25"
    assert found[3][4][1:] == [number(data["weights"]["decoder_norm"][k]) for k in ("mean", "std", "min", "max")]
    top = found[5][1:]
    assert [int(row[1]) for row in top] == [f["feature"] for f in data["top_features"]]
    assert [row[3] for row in top] == [number(f["max_activation"]) for f in data["top_features"]]
    for shown, rows in zip(data["top_features"], found[6:], strict=False):
        f = data["features"][shown["feature"]]
        keys = ("max_activation", "mean_activation", "count", "density", "samples")
        assert rows[1] == [number(f[k]) for k in keys]
    for finding in data["insights"]:
        assert f"{finding['text']} Rule *{finding['rule']}*" in markdown
        assert f"measured {number(finding['value'])}" in markdown
    for recommendation in data["recommendations"]:
        assert recommendation["text"] in markdown
    assert {row[0].replace("\\", "") for row in found[-1][1:]} >= set(files)


def test_skipped_input_and_events() -> None:
    def render(facts: RunFacts) -> str:
        analysis = make_analysis(facts=facts)
        files = write_report(analysis, make_examples(), [])
        assert Analysis.model_validate_json(files["layer1_analysis_report.json"]) == analysis
        return files["layer1_analysis_report.md"].decode()

    quiet = render(make_facts())
    assert "### Skipped input\n\nnone\n" in quiet
    assert "What happened" not in quiet
    assert dict(tables(quiet)[0])["Dropped tokens (activations not finite)"] == "0"

    events: list[dict[str, Any]] = [
        {"time": f"2026-01-01T00:00:{i:02d}Z", "kind": "restart", "message": f"trainer {i}|gone", "step": i, "rank": 1}
        for i in range(60)
    ]
    del events[1]["step"]
    changes = {
        "skipped_documents": {"not UTF-8": 1200, "corrupt Parquet": 2},
        "skipped_examples": ("not UTF-8: /data/a|b_c.txt", "corrupt Parquet: /data/d.parquet, row group 1"),
        "dropped_tokens": 1234,
        "events": tuple(events),
    }
    markdown = render(make_facts().model_copy(update=changes))
    found = tables(markdown)
    assert dict(found[0])["Dropped tokens (activations not finite)"] == "1,234"
    assert found[3] == [["Reason", "Documents"], ["not UTF-8", "1,200"], ["corrupt Parquet", "2"]]
    assert "- not UTF-8: /data/a\\|b\\_c.txt\n- corrupt Parquet: /data/d.parquet, row group 1\n" in markdown
    assert found[4][0] == ["Time", "Step", "Event"]
    assert found[4][1] == ["2026-01-01T00:00:00Z", "0", "restart: trainer 0\\|gone"]
    assert found[4][2][1] == "–"
    assert len(found[4]) == 1 + 50
    assert "\nAnd 10 more" in markdown


def test_hostile_tokens_stay_text() -> None:
    examples = make_examples()
    markdown = write_report(make_analysis(), examples, [])["layer1_analysis_report.md"].decode()
    tables(markdown)
    assert "<script" not in markdown
    assert "\u202e" not in markdown
    # Every backtick is escaped or is a pair that the report itself writes.
    assert len(re.findall(r"(?<!\\)`", markdown)) % 2 == 0
    for text in HOSTILE:
        assert "\n" not in token(text)
        assert not re.search(r"(?<!\\)[|`*]", token(text))
    assert token("\n") == "⏎"
    assert token("  ") == "␣␣"
    assert token(" the") == "␣the"
    assert token("") == "(empty)"
    assert escape("**") == r"\*\*"
    assert context(["the", " Congress", " of"], 1) == "… the **Congress** of …"
    assert context(["a", "|", "b"], 1) == r"… a<b>\|</b>b …"
    assert context(["a", "\n", "b"], 1) == "… a<b>⏎</b>b …"


def test_numbers() -> None:
    shown = [number(v) for v in (0, 1234567, 0.123456, 12345.6, 1e-7, None, float("nan"))]
    assert shown == ["0", "1,234,567", "0.1235", "12,346", "1e-07", "not measured", "undefined"]
    assert percent(0.0223) == "2.23 %"


def pixels(png: bytes) -> tuple[int, ...]:
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image.std() > 0.01  # something is drawn
    return image.shape[:2]


@pytest.mark.parametrize("case", ["full", "no history", "no samples", "no loss", "one group", "all silent"])
def test_degenerate_runs(case: str) -> None:
    groups = (10,) if case == "one group" else GROUPS
    transcoder = make_transcoder(groups)
    config = make_config(transcoder={"group_sizes": list(groups)})
    none = [0] * 10
    examples = make_examples(none if case in ("no samples", "all silent") else SAMPLES)
    history = [] if case == "no history" else make_history(50, prefixes=len(groups))
    analysis = make_analysis(
        config,
        transcoder=transcoder,
        examples=examples,
        history=history,
        statistics=make_statistics(none if case == "all silent" else COUNTS),
        evaluation=make_evaluation(list(transcoder.prefixes), loss=case != "no loss"),
    )
    files = write_report(analysis, examples, history)
    markdown, as_json, overview, scatter = files.values()
    tables(markdown.decode())
    assert Analysis.model_validate_json(as_json) == analysis
    assert pixels(overview) == (1008, 1680)
    assert pixels(scatter) == (960, 1400)
    text = markdown.decode()
    assert ("not measured" in text.split("## 2.")[0]) == (case == "no loss")
    if case == "all silent":
        assert "None of the 10 features fired" in text
        assert analysis.top_features == ()
        assert analysis.summary.few_samples_fraction is None


def test_json_keeps_undefined_numbers() -> None:
    evaluation = make_evaluation([4, 10])
    assert evaluation.loss
    loss = evaluation.loss.model_copy(update={"recovered_zero": [float("nan"), float("inf")]})
    analysis = make_analysis(evaluation=evaluation.model_copy(update={"loss": loss}))
    files = write_report(analysis, make_examples(), [])
    data = json.loads(files["layer1_analysis_report.json"], parse_constant=lambda name: pytest.fail(name))
    again = Analysis.model_validate(data)
    assert again.summary.loss
    assert again.summary.loss.recovered_zero[1] == float("inf")
    assert "undefined" in files["layer1_analysis_report.md"].decode()
    assert "loss recovered" not in findings(analysis)
