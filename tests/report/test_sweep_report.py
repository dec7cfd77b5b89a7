"""The report of a sweep: its front and its choice by hand, and that all three forms agree."""

import json

import pytest

from mtc.analysis.pareto import Point, front, knee
from mtc.report.sweep import write_sweep_report
from mtc.results import number
from tests.report.test_report import pixels
from tests.report_example import make_analysis, make_config, make_evaluation, make_facts
from tests.report_pages import read_html, read_markdown, squeeze

NAMES = ("k16", "k32", "k64", "k32-wide", "k128")
FIGURES = ((16.0, 0.60), (32.0, 0.40), (64.0, 0.38), (32.5, 0.45), (128.0, 0.30))


def test_what_says_nothing_is_not_compared(analyses):
    """A share of a loss that zero ablation does not cost, a rate that was not given, and other nesting."""
    sweep = [{"optimizer.lr": None}, {"optimizer.lr": 0.001}]
    names = ["layer1-k16", "layer1-k32"]
    summaries = [analyses[name].summary for name in names]
    loss = summaries[0].loss.model_copy(update={"ce_zero": summaries[0].loss.ce_clean - 0.1})
    flat = {"prefixes": summaries[1].prefixes[-1:], "fvu": summaries[1].fvu[-1:], "loss": loss}
    changed = [summaries[0].model_copy(update={"loss": loss}), summaries[1].model_copy(update=flat)]
    those = {name: analyses[name].model_copy(update={"summary": s}) for name, s in zip(names, changed, strict=True)}
    page, _, _ = read_html(write_sweep_report(those, sweep)["sweep_report.html"].decode())
    headers, *rows = page.table("Held-out figures of every transcoder")
    shown = [dict(zip(headers, row, strict=True)) for row in rows]
    assert {row["Loss recovered (zero ablation)"] for row in shown} == {"says nothing"}
    assert "loss recovered" not in page.text.partition("To take")[2].partition(".")[0]
    assert shown[0]["optimizer.lr"] == str(analyses[names[0]].config.lr)
    assert shown[1]["FVU of its prefixes"] == "not nested"
    assert "differ in how many nested prefixes" in page.text


def test_the_front_and_the_knee_by_hand():
    points = [Point(*each) for each in FIGURES]
    assert front(points) == [0, 1, 2, 4], "k32-wide has no less FVU than k32"
    # The line from (16, 0.60) falls by 0.1 with every doubling: k32 lies 0.1 below it, k64 0.02.
    assert knee(points) == 1
    above = [Point(16.0, 0.60), Point(32.0, 0.59), Point(64.0, 0.30)]
    assert front(above) == [0, 1, 2]
    assert knee(above) == 2, "no knee: the least FVU"
    assert knee([Point(31.6, 0.50), Point(32.4, 0.41)]) == 1
    assert front([Point(31.6, 0.50), Point(32.4, 0.41)]) == [1], "the same L0, as well as it can be calibrated"
    assert front([Point(31.0, 0.50), Point(32.4, 0.41)]) == [0, 1]
    assert front([Point(9.0, float("nan")), Point(9.0, 0.4), Point(7.0, 0.4)]) == [2, 1]
    assert knee([Point(0.0, 1.0), Point(8.0, 0.5), Point(16.0, 0.4)]) == 2, "an L0 of 0 has no logarithm"


@pytest.fixture(scope="module")
def analyses():
    base, _ = make_analysis(evaluation=make_evaluation([4, 10], massive=True))
    found = {}
    for layer in (1, 2):
        for name, (l0, fvu) in zip(NAMES, FIGURES, strict=True):
            model = base.config.model.model_copy(update={"layer": layer})
            lower = fvu / layer if name == "k32-wide" else fvu  # the best one of layer 2
            summary = base.summary.model_copy(update={"l0": l0, "fvu": (*base.summary.fvu[:-1], lower)})
            config = make_config().model_copy(update={"model": model})
            member = f"layer{layer}-{name}"
            facts = make_facts(run_id=f"run_1/{member}", captured_tokens=2048)
            found[member] = base.model_copy(update={"summary": summary, "config": config, "facts": facts})
    return found


def test_markdown_page_and_json_name_the_same_ones(analyses):
    sweep = [{"transcoder.k": 16}, {"transcoder.k": 32}, {"transcoder.k": 64}, {"transcoder.skip": True}, {}]
    files = write_sweep_report(analyses, sweep)
    markdown = read_markdown(files["sweep_report.md"].decode())
    page, _, targets = read_html(files["sweep_report.html"].decode())
    assert markdown.tables == page.tables
    headers, *rows = page.table("Held-out figures of every transcoder")
    assert [row[0] for row in rows] == list(analyses)
    assert headers[:4] == ["Transcoder", "Layer", "transcoder.k", "transcoder.skip"]
    shown = {row[0]: dict(zip(headers, row, strict=True)) for row in rows}
    assert (shown["layer1-k64"]["L0"], shown["layer1-k64"]["FVU"]) == ("64", "0.38")
    beside = ("FVU of the affine map", "FVU of all tokens", "Massive tokens", "Their share of the variance")
    assert [shown["layer1-k64"][header] for header in beside] == ["0.62", "0.2512", "20", "51.83 %"]
    for text in (page.text, markdown.text):
        assert "FVU and L0 are without massive tokens" in squeeze(text)
        assert "at most 3 % larger, both without massive tokens." in squeeze(text)
        assert "8,192 tokens trained (2,048 captured), 1,000 held-out tokens analysed" in squeeze(text)
    origin = dict(page.table("Where the figures come from")[1:])
    assert (origin["Run"], origin["Seeds"]) == ("run_1", "data 0"), (
        "what the first transcoder alone has is not the run's"
    )
    assert "Configuration fingerprint" not in origin
    assert not any(a.training.fingerprint in page.text for a in analyses.values())
    assert shown["layer1-k64"]["FVU of its prefixes"] == number(analyses["layer1-k64"].summary.fvu[0])
    assert "differ in how many nested prefixes" not in page.text
    data = json.loads(files["sweep_report.json"])
    assert data["taken"] == {"1": "layer1-k32", "2": "layer2-k32-wide"}
    for member in data["members"]:
        choice = "to take" if member["taken"] else "on the front" if member["on_front"] else ""
        assert shown[member["member"]]["Choice"] == choice
        assert member["summary"]["fvu"] == list(analyses[member["member"]].summary.fvu)
    assert data["members"][3]["settings"] == {"transcoder.skip": True}
    assert not any(m["on_front"] for m in data["members"] if m["member"] in ("layer1-k32-wide", "layer2-k32"))
    assert "To take at layer 2: layer2-k32-wide" in " ".join(page.items)
    assert squeeze(data["rule"]) in squeeze(page.text)
    assert "../layer2-k32-wide/report/layer2_analysis_report.html" in targets
    assert "(../layer2-k32-wide/report/layer2_analysis_report.md)" in markdown.text
    assert pixels(files["sweep_overview.png"]) == (1560, 1680)
