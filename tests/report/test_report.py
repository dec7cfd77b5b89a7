"""The analysis against figures worked out by hand, and the report's three forms against the analysis."""

import html
import io
import json
import re
import subprocess
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest

from mtc.analysis.copies import FoundCopies
from mtc.report import write_report
from mtc.report.blocks import Label
from mtc.report.format import context, escape, token, visible
from mtc.report.html import Renderer, render_html
from mtc.report.html import label as label_html
from mtc.report.layers import write_layers_report
from mtc.report.markdown import render_markdown
from mtc.report.sections import document
from mtc.results import (
    PLOTS,
    Analysis,
    Explained,
    GraphScores,
    LayersReport,
    ReplacedLayers,
    RunFacts,
    ScoredPrompt,
    number,
    percent,
    report_files,
    report_names,
)
from tests.report_example import (
    COUNTS,
    HOSTILE,
    NONE,
    SAMPLES,
    TOKENS,
    bare_analysis,
    make_analysis,
    make_config,
    make_evaluation,
    make_examples,
    make_facts,
    make_findings,
    make_history,
    make_massive_sums,
    make_statistics,
    make_transcoder,
)
from tests.report_pages import Page, read_html, read_markdown, squeeze

SCHEMA = Path(__file__).parents[2] / "docs" / "analysis.schema.json"
MARKDOWN, HTML, JSON = report_names(1)
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def analysed() -> tuple[Analysis, pa.Table]:
    return make_analysis()


@pytest.fixture(scope="module")
def files(analysed: tuple[Analysis, pa.Table]) -> Files:
    return write_report(*analysed, make_history(50))


@pytest.fixture(scope="module")
def page(files: Files) -> Page:
    return read_html(files[HTML].decode())[0]


@pytest.fixture(scope="module")
def data(files: Files) -> Any:
    return json.loads(files[JSON])


def test_summary_counts() -> None:
    s = make_analysis()[0].summary
    assert (s.total_features, s.silent_features, s.silent_fraction) == (10, 2, 0.2)
    assert (s.dead_features, s.dead_fraction) == (2, 0.2)  # counters 500 and 501 of 500
    assert (s.features_with_samples, s.total_samples, s.uniform_examples) == (7, 58, 13)
    assert s.average_samples == pytest.approx(58 / 7)
    assert s.few_samples_fraction == 3 / 8  # features 3, 4 and 9 of the eight that fired
    assert (s.dense_features, s.dense_fraction) == (2, 0.2)  # 100 of 1,000 tokens is not more than 10 %
    assert s.dense_activation_share == pytest.approx(601 / sum(COUNTS))
    assert s.explained_variance == pytest.approx((0.4, 0.5487655))


def test_features_and_weights() -> None:
    transcoder = make_transcoder()
    analysis, table = make_analysis(transcoder=transcoder)
    assert table["count"].to_pylist() == COUNTS
    assert table["samples"].to_pylist() == SAMPLES
    assert table["group"].to_pylist() == [0] * 4 + [1] * 6
    assert table["density"].to_pylist() == [c / TOKENS for c in COUNTS]
    assert table["top_tokens"][3].as_py() == [
        {"token_id": 0, "token": "|", "count": 5},
        {"token_id": 3, "token": HOSTILE[3], "count": 2},
    ]
    assert [f.feature for f in analysis.top_features] == [9, 8, 7, 6, 4, 3]
    assert [f.label for f in analysis.top_features] == [None, *(table["label"][j].as_py() for j in (8, 7, 6, 4, 3))]
    assert table["label"][3].as_py() == "'|' (5 of 7) in 'the| of|' (5 of 7)"
    shown = {f.figures.feature: f for f in analysis.features}
    assert [f.reason for f in analysis.features] == ["strongest"] * 6 + ["drawn"]
    assert list(shown)[:6] == [9, 8, 7, 6, 4, 3]
    assert shown[8].figures.parent
    assert shown[8].figures.parent.feature == 0
    assert [e.kind for e in shown[8].examples] == ["top"] * 5 + ["sample"] * 2
    w = analysis.weights
    assert w.decoder_norm.mean == pytest.approx(5.5)
    assert w.decoder_norm.std == pytest.approx(np.arange(1, 11).std())
    assert (w.decoder_norm.min, w.decoder_norm.max) == (1, 10)
    assert [g.decoder_norm for g in w.groups] == pytest.approx([2.5, 7.5])
    assert [g.silent_features for g in w.groups] == [1, 1]
    assert w.encoder.std == pytest.approx(float(transcoder.W_enc.detach().double().std(correction=0)), rel=1e-5)
    (gain,) = analysis.prefix_steps[1].tokens
    assert (gain.token, gain.count, gain.before, gain.after) == (HOSTILE[3], 20, 1.0, 0.5)


def test_another_dictionary_is_refused() -> None:
    with pytest.raises(ValueError, match="statistics of 3 features"):
        make_analysis(statistics=make_statistics([1, 2, 3]))
    with pytest.raises(ValueError, match="prefixes"):
        make_analysis(evaluation=make_findings(make_transcoder()).evaluation.model_copy(update={"prefixes": [3, 10]}))


def texts(analysis: Analysis) -> tuple[str, str]:
    """Markdown and HTML, with empty plots."""
    content = document(analysis)
    empty = dict.fromkeys(PLOTS, '<svg viewBox="0 0 1 1"></svg>')
    return render_markdown(content, dict.fromkeys(PLOTS, "plot.png")), render_html(content, empty)


def test_files(files: Files, data: Any, analysed: tuple[Analysis, pa.Table]) -> None:
    assert list(files) == list(report_files(1))
    assert len(files) == 3 + 2 * len(PLOTS)
    assert {f["name"] for f in data["files"]} > set(files)
    assert all(f["description"] for f in data["files"])
    assert write_report(*analysed, make_history(50)) == files


def test_markdown_and_html_show_the_same(files: Files, page: Page) -> None:
    markdown = read_markdown(files[MARKDOWN].decode())
    key, *tables = markdown.tables
    assert tables == page.tables
    assert len(tables) > 25
    for label, value, note in key[1][1:]:
        assert f"{label}{value} {note}" in page.text or f"{label} {value} {note}" in page.text
    lists = {i for i in page.items if not re.match("…|.*Rule: ", i)}
    met = {i for i in markdown.items if " Rule " not in i and not i.startswith("…")}
    assert met < lists
    contexts = [squeeze(i.replace("␣", "")) for i in page.items if i.startswith("…")]
    assert len(contexts) == sum(i.startswith("…") for i in markdown.items) == 5 * 7 - 4 - 5 + 2 * 6 - 1
    titles = [t for level, t in markdown.headings if level == 2]
    assert titles == [t for level, t in page.headings if level == 2]
    assert titles == [
        "1. Executive summary", "2. Training configuration", "3. Evaluation", "4. Model weight analysis",
        "5. Top features by activation", "6. Feature analysis", "7. Nested dictionary", "8. Probing", "9. Labels",
        "10. Insights",
        "11. Recommendations", "12. Files generated", "Provenance",
    ]  # fmt: skip
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def pair(ends: list[float]) -> str:
    return f"{number(ends[0])} to {number(ends[1])}"


def percents(ends: list[float]) -> str:
    return f"{percent(ends[0])} to {percent(ends[1])}"


def test_summary_agrees_with_json(page: Page, data: Any) -> None:
    s, loss = data["summary"], data["summary"]["loss"]
    for i, row in enumerate(page.table("Held-out quality")[1:]):
        assert row == [
            number(s["prefixes"][i]), number(s["fvu"][i]), pair(s["fvu_interval"][i]),
            percent(s["explained_variance"][i]), number(s["cosine"][i]), number(data["evaluation"]["l0"][i]),
            percent(loss["recovered_zero"][i]), percents(loss["recovered_zero_interval"][i]),
            percent(loss["recovered_mean"][i]), percents(loss["recovered_mean_interval"][i]), number(loss["kl"][i]),
            number(loss["ce_spliced"][i]),
        ]  # fmt: skip
    figures = dict(page.table("All figures")[1:])
    assert figures["Total features"] == number(s["total_features"]) == "10"
    assert figures["Dead fraction"] == percent(s["dead_fraction"]) == "20 %"
    assert figures["Average samples per feature (of those with samples)"] == number(s["average_samples"]) == "8.286"
    assert figures["Documents that they are of"] == number(s["documents"]) == "9"
    assert "FVU0.4512 95 %: 0.4278 to 0.4825" in page.text.replace("FVU 0", "FVU0")
    assert "from 9 documents, the loss is of 400 tokens from 7 documents" in page.text
    for insight in data["insights"]:
        assert (squeeze(insight["text"]) in page.items) == insight["met"]


def test_configuration_and_provenance_agree_with_json(page: Page, data: Any) -> None:
    setting, facts = dict(page.table("Settings")[1:]), data["facts"]
    assert setting["Learning rate"] == number(data["config"]["optimizer"]["lr"])
    assert setting["Inference threshold"] == number(data["training"]["threshold"]) == "0.25"
    fields = dict(page.table("Configuration")[1:])
    assert fields["transcoder.group_sizes"] == "4, 6"
    assert fields["analysis.num_tokens"] == str(data["config"]["analysis"]["num_tokens"])
    assert len(fields) == sum(len(part) for name, part in data["config"].items() if name != "sweep")
    origin = dict(page.table("Where the figures come from")[1:])
    assert origin["Configuration fingerprint"] == data["training"]["fingerprint"]
    assert origin["Data fingerprint"] == facts["data_fingerprint"] == "feed" * 4
    assert origin["Git revision"] == facts["git_revision"]
    assert origin["Version of torch"] == facts["versions"]["torch"]
    assert origin["Wall time (s)"] == number(sum(facts["seconds"].values())) == "15.75"
    assert origin["Hardware"] == "a processor, 2 CPUs"
    assert origin["Seeds"] == "data 0, transcoder 0"


def test_evaluation_and_weights_agree_with_json(page: Page, data: Any) -> None:
    e, loss, w = data["evaluation"], data["evaluation"]["loss"], data["weights"]
    active = dict(page.table("Active features")[1:])
    # Of 1,000 tokens 20 have none, 80 two, 200 three, 300 four, 250 five, 100 six, 50 eight.
    quantiles = {"5 %": "2", "25 %": "3", "50 %": "4", "75 %": "5", "95 %": "6"}
    assert {k: active[f"{k} of the tokens have at most"] for k in quantiles} == quantiles
    assert active["Largest number"] == "8"
    assert active["Tokens with no active feature"] == "2 %"
    assert active["Mean, 95 % interval"] == pair(e["l0_interval"][-1])
    for name, slices in (("Tokens by position", e["by_position"]), ("Tokens by frequency", e["by_frequency"])):
        for row, part in zip(page.table(name)[1:], slices, strict=True):
            ends = f"{number(part['low'])} to {number(part['high'])}"
            figures = [number(v) for v in (part["tokens"], *part["fvu"], part["cosine"][-1], part["l0"])]
            assert row == [ends, *figures]
    rows = page.table("Next-token loss")[1:]
    assert [row[1] for row in rows[:3]] == [number(loss[k]) for k in ("ce_clean", "ce_zero", "ce_mean")]
    assert [row[2] for row in rows] == ["0", "2", "1", "0.5123", "0.5123"]
    assert rows[4][3:5] == [number(loss["kl"][1]), pair(loss["kl_interval"][1])]
    density = page.table("Features by density")
    counted = [[int(c) for c in column] for column in zip(*(row[1:] for row in density[1:]), strict=True)]
    assert [sum(c) for c in counted] == [sum(c) for c in data["density"]["counts"]] == [3, 5]
    distributions = page.table("Distribution of the weights")
    assert distributions[4][1:] == [number(w["decoder_norm"][k]) for k in ("mean", "std", "min", "max")]
    assert distributions[5][1] == number(w["alignment"]["mean"])
    for row, g in zip(page.table("Groups of")[1:], w["groups"], strict=True):
        assert row[2:] == [number(g[k]) for k in ("decoder_norm", "alignment", "silent_features", "mean_density")]


def test_features_agree_with_json(page: Page, data: Any, files: Files) -> None:
    top = page.table("The strongest features")[1:]
    assert [int(row[1]) for row in top] == [f["feature"] for f in data["top_features"]]
    assert [row[3] for row in top] == [number(f["max_activation"]) for f in data["top_features"]]
    assert top[0][6] == "no samples"
    text = files[HTML].decode()
    keys = ("max_activation", "mean_activation", "count", "density", "samples", "tokens_since_fired")
    for shown in data["features"]:
        f = shown["figures"]
        names = (*keys, "decoder_norm", "alignment")
        assert page.table(f"Figures of feature {f['feature']}")[1] == [number(f[k]) for k in names]
        start = text.index(f'id="feature-{f["feature"]}"')
        card, _, _ = read_html(text[start : text.find("<h4>", start)])
        tokens = ", ".join(f"{plain_token(t['token'])} ×{t['count']}" for t in f["top_tokens"])
        assert f"Top tokens: {tokens or 'no samples'}" in card.items
        assert f"Label: {f['label'] or 'no samples'}" in card.items
        assert "Raises the logits of: | 0.5" in card.text
        assert "Lowers the logits of: " in card.text
        near = ", ".join(f"{n['feature']} ({number(n['cosine'])})" for n in f["neighbours"])
        assert f"Nearest features (decoder cosine): {near}" in card.items
        if f["parent"]:
            line = next(item for item in card.items if item.startswith("Parent: "))
            assert line.startswith(f"Parent: {f['parent']['feature']} (decoder cosine 0.4321; fires on 87.65 %")
        bins = [(a, b, n) for a, b, n in zip(*edges(data), f["histogram"], strict=True) if n]
        assert "; ".join(f"{number(a)} to {number(b)}: {number(n)}" for a, b, n in bins) in card.text
        titles = re.findall(r'<b class="a\d" title="activation ([^"]+)"', text[start : text.find("<h4>", start)])
        assert titles == [number(e["activation"]) for e in shown["examples"]]
        for e in shown["examples"]:
            quantile = "" if e["quantile"] is None else f", quantile {number(e['quantile'])}"
            place = f"position {e['position']} (next to nothing before it)"  # all are at 1
            assert f"{number(e['activation'])}{quantile}, {place}, document {e['document_id']}" in card.text


def edges(data: Any) -> tuple[list[float], list[float]]:
    return data["activation_edges"][:-1], data["activation_edges"][1:]


def plain_token(text: str) -> str:
    return squeeze(text.replace("\n", "⏎").replace("\u202e", "U+202E").replace(" ", "␣"))


def test_nesting_and_findings_agree_with_json(page: Page, data: Any, files: Files) -> None:
    tree = data["tree"]
    steps = page.table("What each group adds")[1:]
    assert [row[3:6] for row in steps] == [["1", "0.6", "0.4"], ["0.6", "0.4512", "0.1488"]]
    assert steps[0][7:] == ["–", percent(data["prefix_steps"][0]["recovered_after"])]
    assert page.table("Tokens that gain most by group 1")[1:] == [[HOSTILE[3], "20", "1", "0.5", "0.5"]]
    assert dict(page.table("Thresholds")[1:]) == {k: number(v) for k, v in tree["limits"].items()}
    assert page.table("Features with a parent")[1:] == [["0", "2", "0"], ["1", "3", "3"]]
    assert "1 (group 0) `code`" not in page.items
    assert any(re.match(r"1 \(group 0\) .*; fires on 25 % of the tokens; children: 2$", i) for i in page.items)
    assert any(re.match(r"6 \(group 1\) .*: cosine 0.4321, co-activation 87.65 %$", i) for i in page.items)
    assert page.table("Splitting candidates")[1][3:] == ["32", "75 %", "6.25 %"]
    assert page.table("Absorption candidates")[1][4:] == ["0.4", "20", "15", "75 %"]
    assert "Found: 1 of 10 pairs that could be tested (10 %)" in page.text
    markdown = files[MARKDOWN].decode()
    for finding in data["insights"]:
        state = "met" if finding["met"] else "not met"
        value, threshold = number(finding["value"]), number(finding["threshold"])
        rule = f"{finding['rule']}: {state}. {finding['text']} Rule: {finding['condition']}; "
        assert squeeze(f"{rule}measured {value}, threshold {threshold}.") in page.items
        assert (
            f"{finding['text']} Rule *{finding['rule']}*: {escape(finding['condition'])}; measured {value}" in markdown
        )
    for finding in data["recommendations"]:
        assert any(
            i.startswith(f"{finding['rule']}. {finding['text'].replace('`', '')} Change {finding['field']}.")
            for i in page.items
        )
        assert finding["text"] in markdown
    assert [row[0] for row in page.table("Files")[1:]] == [f["name"] for f in data["files"]]


def test_page_needs_nothing_outside(files: Files) -> None:
    html = files[HTML].decode()
    _, ids, targets = read_html(html)
    assert len(set(ids)) == len(ids)
    assert {t[0] for t in targets} == {"#"}  # links lead to places in the page
    assert {t[1:] for t in targets} <= set(ids)
    assert "#feature-8" in targets
    assert not re.search(r"https?:(?!//www\.w3\.org)", html)
    assert not re.search(r"url\((?!#)|@import|<link|<img|<iframe| src=", html)
    assert "default-src 'none'" in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
        assert 'role="img"' in svg
        assert re.search('aria-label="[^"]{20,}"', svg)
        assert "<style" not in svg
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", html))
    assert colours
    assert all(max(int(c[i : i + 2], 16) for i in (1, 3, 5)) > 0x90 for c in colours)  # ink and paper are the page's


def test_colours_can_be_read() -> None:
    """WCAG 2.2, level AA: contrast of at least 4.5 for text, in both colour schemes."""
    css = (resources.files("mtc.report") / "templates" / "report.css").read_text()
    pairs = dict(re.findall(r"--(\w+): light-dark\((.*?)\);", css))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in (0, 1):
        light = {name: luminance(both.split(", ")[scheme]) for name, both in pairs.items()}
        for text in ("ink", "muted", "link", "alarm"):
            for ground in ("paper", "raised"):
                a, b = sorted((light[text], light[ground]))
                assert (b + 0.05) / (a + 0.05) >= 4.5, (scheme, text, ground)


def test_plots(files: Files) -> None:
    sizes = {"layer1_analysis_overview": (1008, 1680)}
    for name, content in files.items():
        stem, kind = name.rsplit(".", 1)
        if kind == "png":
            assert pixels(content) == sizes.get(stem, (680, 960))
            assert f"]({name})" in files[MARKDOWN].decode() or stem in sizes
        elif kind == "svg":
            root = ElementTree.fromstring(content)
            text = " ".join(root.itertext())
            assert not re.search(r"20\d\d-\d\d|Matplotlib", content.decode())
            assert len(text.split()) > 10  # titles, axes and ticks are text
    axes = {
        "plots/prefix_fvu": ["prefix (features)", "FVU (1 - explained variance)", "0.4512"],
        "plots/prefix_recovered": ["loss recovered (share)", "95 % interval"],
        "plots/l0": ["active features (L0 of a token)", "tokens", "mean 4.4"],
        "plots/density": ["log10 of the share of held-out tokens", "features", "group 1"],
        "plots/fvu_by_position": ["position (tokens)", "FVU (share of variance)", "2–3"],
        "plots/fvu_by_frequency": ["occurrences in the held-out text (tokens)", "100–999"],
        "activation_vs_samples": ["samples (at most 10)", "max activation (scaled units)", "2 silent"],
    }
    for name, labels in axes.items():
        text = " ".join(" ".join(ElementTree.fromstring(files[f"{name}.svg"]).itertext()).split())
        assert all(label in text for label in labels), (name, text)


def pixels(png: bytes) -> tuple[int, ...]:
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image.std() > 0.01  # something is drawn
    return image.shape[:2]


def test_skipped_input_and_events() -> None:
    def render(facts: RunFacts) -> tuple[Page, Page]:
        markdown, html = texts(make_analysis(facts=facts)[0])
        return read_markdown(markdown), read_html(html)[0]

    for quiet in render(make_facts()):
        assert (3, "What happened during the run") not in quiet.headings
        assert dict(quiet.table("All figures")[1:])["Dropped tokens (activations not finite)"] == "0"
    events: list[dict[str, Any]] = [
        {"time": f"2026-01-01T00:00:{i:02d}Z", "kind": "restart", "message": f"trainer {i}|gone", "step": i, "rank": 1}
        for i in range(60)
    ]
    del events[1]["step"]
    changes = {
        "skipped_documents": {"not UTF-8": 1200, "corrupt Parquet": 2},
        "skipped_examples": ("not UTF-8: /data/a|b_c.txt", "corrupt Parquet: /data/d.parquet, row group 1"),
        "unread_files": {"hidden": 2},
        "unread_examples": ("hidden: /data/.git",),
        "dropped_tokens": 1234,
        "events": tuple(events),
    }
    for page in render(make_facts(**changes)):
        assert dict(page.table("All figures")[1:])["Dropped tokens (activations not finite)"] == "1,234"
        assert page.table("Documents that")[1:] == [["not UTF-8", "1,200"], ["corrupt Parquet", "2"]]
        assert page.table("Entries of data.name")[1:] == [["hidden", "2"]]
        assert {*changes["skipped_examples"], *changes["unread_examples"]} < set(page.items)
        found = page.table("Events")
        assert found[:2] == [["Time", "Step", "Event"], ["2026-01-01T00:00:00Z", "0", "restart: trainer 0|gone"]]
        assert found[2][1] == "–"
        assert len(found) == 1 + 50
        assert "And 10 more" in page.text


def test_hostile_text_stays_text() -> None:
    facts = make_facts(
        run_id='"><script>alert(1)</script>', data_name="</style><img src=x>`|", hardware=("\u202e</p>",)
    )
    markdown, html = texts(make_analysis(facts=facts)[0])
    read_markdown(markdown)
    for text in (markdown, html):
        assert "\u202e" not in text
        assert "<img" not in text
        assert len(re.findall("<script", text)) == (text is html)  # its own
        assert len(re.findall("</style", text)) == (text is html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r"<[^>]*\sonload", html)
    # Every backtick is escaped or is a pair that the report itself writes.
    assert len(re.findall(r"(?<!\\)`", markdown)) % 2 == 0
    for text in HOSTILE:
        assert "\n" not in token(text)
        assert not re.search(r"(?<!\\)[|`*]", token(text))
    assert token("\n") == "⏎"
    assert token("  ") == "␣␣"
    assert token(" the") == "␣the"
    assert token("") == "⋯"
    assert escape("**") == r"\*\*"
    assert context(["the", " Congress", " of"], 1) == "… the **Congress** of …"
    assert context(["a", "|", "b"], 1) == r"… a<b>\|</b>b …"
    assert context(["a", "\n", "b"], 1) == "… a<b>⏎</b>b …"


def test_hostile_labels_stay_text() -> None:
    """A label is made harmless where it is made, too; here it is shown raw."""
    label = "'<script>`a`|b' (3 of 3) in \"*[x]: y**\n| c |\u202e<!-- $x$ & \\"

    def relabelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: label if k.endswith("label") and v else relabelled(v) for k, v in value.items()}
        return [relabelled(v) for v in value] if isinstance(value, list) else value

    analysis = Analysis.model_validate(relabelled(json.loads(make_analysis()[0].model_dump_json())))
    markdown, html = texts(analysis)
    shown = label.replace("\n", "⏎").replace("\u202e", "U+202E")
    for page in (read_markdown(markdown), read_html(html)[0]):
        assert [row[-1] for row in page.table("The strongest features")[1:]] == ["no samples", *[shown] * 5]
        assert page.table("Absorption candidates")[1][1:4:2] == [shown, shown]
        assert page.table("Splitting candidates")[1][1] == shown
        assert f"Label: {shown}" in page.items
        assert any(item.startswith(f"1 (group 0) {shown}; fires on 25 %") for item in page.items)
        assert f"6 (group 1) {shown}: cosine 0.4321, co-activation 87.65 %" in page.items
    assert "\u202e" not in markdown + html
    assert len(re.findall("<script|<!--", html)) == 1  # its own
    assert "<script" not in markdown and "<!--" not in markdown


def test_numbers() -> None:
    shown = [number(v) for v in (0, 1234567, 0.123456, 12345.6, 1e-7, None, float("nan"))]
    assert shown == ["0", "1,234,567", "0.1235", "12,346", "1e-07", "not measured", "undefined"]
    assert percent(0.0223) == "2.23 %"


@pytest.mark.parametrize("case", ["no history", "no samples", "no loss", "one group", "all silent", "bare"])
def test_degenerate_runs(case: str) -> None:
    history = [] if case in ("no history", "bare") else make_history(50, prefixes=1 if case == "one group" else 2)
    parts: dict[str, Any] = {
        "no samples": {"examples": make_examples(NONE)},
        "no loss": {"evaluation": make_evaluation([4, 10], loss=False), "effects": None},
        "one group": {"transcoder": make_transcoder((10,))},
        "all silent": {"statistics": make_statistics(NONE), "examples": make_examples(NONE)},
    }.get(case, {})
    config = make_config(transcoder={"group_sizes": [10]}) if case == "one group" else None
    analysis, features = bare_analysis() if case == "bare" else make_analysis(config, history=history, **parts)
    files = write_report(analysis, features, history)
    markdown, (page, ids, targets) = read_markdown(files[MARKDOWN].decode()), read_html(files[HTML].decode())
    assert markdown.tables[1:] == page.tables
    assert {t[1:] for t in targets} <= set(ids)
    assert Analysis.model_validate_json(files[JSON]) == analysis
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(json.loads(files[JSON]))
    for name, content in files.items():
        if name.endswith(".png"):
            pixels(content)
    summary = page.text[page.text.index("1. Executive") : page.text.index("2. Training")]
    assert ("not measured" in summary) == (case in ("no history", "no loss", "all silent", "bare"))
    assert ("The tree was not measured" in page.text) == (case in ("one group", "bare"))
    assert ("None of the 10 features fired" in page.text) == (case in ("all silent", "bare"))
    if case == "bare":
        for text in (
            "The number of active features by token was not measured", "Tokens by position in the window: not measured",
            "Tokens by frequency in the held-out text: not measured", "with fewer than 5 documents there are none",
            "with the transcoder in the MLP's place was not measured", "The time of training was not measured",
        ):  # fmt: skip
            assert text in page.text, text
        assert dict(page.table("Where")[1:])["Git revision"] == "not known"
        assert page.table("Distribution")[5][1:] == ["not measured"] * 4


def test_json_keeps_undefined_numbers() -> None:
    evaluation = make_evaluation([4, 10])
    assert evaluation.loss
    loss = evaluation.loss.model_copy(update={"recovered_zero": [float("nan"), float("inf")]})
    analysis, features = make_analysis(evaluation=evaluation.model_copy(update={"loss": loss}))
    files = write_report(analysis, features, [])  # the plots too
    data = json.loads(files[JSON], parse_constant=lambda name: pytest.fail(name))
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(data)
    again = Analysis.model_validate(data)
    assert again.summary.loss
    assert again.summary.loss.recovered_zero[1] == float("inf")
    assert "undefined" in files[MARKDOWN].decode()
    assert "loss recovered" not in {i.rule for i in analysis.insights}


def test_a_share_of_a_loss_that_the_ablation_does_not_raise_is_no_key_figure() -> None:
    evaluation = make_evaluation([4, 10])
    assert evaluation.loss
    harmless = {"ce_zero": 2.99, "recovered_zero": [2.16, 2.16]}
    loss = evaluation.loss.model_copy(update=harmless)
    analysis, features = make_analysis(evaluation=evaluation.model_copy(update={"loss": loss}))
    files = write_report(analysis, features, [])
    key = read_markdown(files[MARKDOWN].decode()).tables[0][1]
    (figure,) = [row for row in key if row[0].startswith("Loss recovered")]
    assert figure[1:] == ["says nothing", "zero ablation does not raise the loss"]


def test_published_schema_is_current_and_holds(data: Any) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "mtc.results.json_schema"], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert SCHEMA.read_text() == printed.stdout, "run: python -m mtc.results.json_schema > docs/analysis.schema.json"
    validator = jsonschema.Draft202012Validator(json.loads(printed.stdout))
    validator.check_schema(validator.schema)
    validator.validate(data)
    wrong = (
        {"format_version": 1}, {"summary": data["summary"] | {"l0": "4.4"}}, {"surprise": 1},
        {"evaluation": data["evaluation"] | {"fvu_interval": [[0.1]]}},
    )  # fmt: skip
    for change in wrong:
        assert not validator.is_valid(data | change), change


def test_massive_tokens_are_told_apart_everywhere() -> None:
    """Figures without them first and of all tokens beside, badges at their features, which are no strongest ones."""
    copies = FoundCopies(800, np.array([-1, -1, -1, 1, -1, -1, 1, -1, 0, -1]))
    evaluation = make_evaluation([4, 10], massive=True)
    sums = make_massive_sums()
    sums.activation[7] = 0.47 * 50
    analysis, features = make_analysis(evaluation=evaluation, massive=sums, copies=copies)
    files = write_report(analysis, features, make_history(50))
    markdown, (page, _, _) = read_markdown(files[MARKDOWN].decode()), read_html(files[HTML].decode())
    # A badge is a word in brackets in Markdown.
    plain = [
        (caption, [[cell.replace(" (massive)", " massive") for cell in row] for row in rows])
        for caption, rows in markdown.tables[1:]
    ]
    assert plain == page.tables
    for text in (page.text, markdown.text):
        assert "FVU, cosine and L0 are of 980 held-out tokens from 9 documents" in squeeze(text)
        assert "FVU, cosine and L0 are without 20 massive tokens (2 %)" in squeeze(text)
        assert "hold 51.83 % of the variance and 1.31 % of the squared error; with them FVU is 0.2512" in squeeze(text)
        assert "75 % of them lie beyond the first 4 positions" in squeeze(text)
        assert "Feature 6 (group 1)" in text
        assert "Found: 3 of 10 features (30 %)" in squeeze(text)
    figures = {row[0]: row[1:] for row in page.table("Figures with and without massive tokens")}
    assert figures["FVU, full dictionary"] == ["0.4512", "–", "0.2512"]
    assert figures["L0"] == ["4.4", "158.2", "6.3"]
    assert page.table("The most frequent massive tokens")[1:] == [["the", "15", "75 %"], ["|", "5", "25 %"]]
    counts = dict(page.table("All figures")[1:])
    assert (counts["Evaluated held-out tokens (FVU, L0)"], counts["Massive tokens beside them"]) == ("980", "20")
    prefixes = page.table("Held-out quality of each nested prefix")
    assert [row[prefixes[0].index("FVU, all tokens")] for row in prefixes[1:]] == ["0.3", "0.2512"]
    line = page.table("The least-squares affine map")
    assert line[1:] == [
        ["tokens that are not massive", "0.62", "0.4512", "27.22 %"], ["all tokens", "0.5", "0.2512", "49.76 %"],
    ]  # fmt: skip
    assert page.table("FVU of the full dictionary, without massive")[1] == ["0.7861", "0.4512", "-42.6 %"]
    assert [row[1] for row in page.table("The strongest features (")[1:]] == ["9", "7", "6", "4", "3", "1"]
    # Feature 7 is just none of massive tokens.
    strongest = page.table("The strongest features (")
    on_massive = {row[1]: row[strongest[0].index("Activation on massive tokens")] for row in strongest[1:]}
    assert on_massive == {str(f.feature): percent(f.massive_activation) for f in analysis.top_features}
    assert on_massive == {"9": "0 %", "7": "47 %", "6": "0 %", "4": "0 %", "3": "0 %", "1": "0 %"}
    assert [row[1] for row in page.table("The strongest features of massive")[1:]] == ["8 massive"]
    assert [(row[0], row[3]) for row in page.table("Features with copies")[1:]] == [("1", "3, 6"), ("0", "8 massive")]

    assert dict(page.table("Configuration")[1:])["transcoder.massive_tokens"] == "cap"

    evaluation = make_evaluation([4, 10])
    older = evaluation.massive.model_copy(update={"in_weights": False})
    none, _ = make_analysis(evaluation=evaluation.model_copy(update={"massive": older}))
    plain_page = read_html(write_report(none, features, [])[HTML].decode())[0]
    assert "No held-out token is massive (target norm above 5 times the median" in squeeze(plain_page.text)
    fields = dict(plain_page.table("Configuration")[1:])
    assert fields["transcoder.massive_tokens"] == "not known to the run", "it was trained before there was a choice"
    assert "all tokens" not in " ".join(plain_page.table("Held-out quality of each nested prefix")[0])


def test_layers_side_by_side() -> None:
    analyses = []
    for layer in (2, 1):
        model = make_config().model.model_copy(update={"layer": layer})
        evaluation = make_evaluation([4, 10], massive=layer == 2)
        analyses.append(make_analysis(make_config().model_copy(update={"model": model}), evaluation=evaluation)[0])
    replaced = ReplacedLayers(
        layers=(1, 2), prefixes=(4, 10), tokens=500, documents=6, ce_clean=3.0, ce_zero=9.0, ce_mean=8.0,
        ce_replaced=(4.5, 3.5), ce_interval=[(4.25, 4.75), (3.25, 3.75)], kl=(1.25, 0.5),
        kl_interval=[(1.0, 1.5), (0.25, 0.75)], agreement=(0.4, 0.75), agreement_interval=[(0.3, 0.5), (0.7, 0.8)],
    )  # fmt: skip
    about = {"features": 9, "completeness": 0.75, "special_errors": 0.125}
    shares = ((0.25, 0.5), (0.5, 0.625))
    prompts = [
        ScoredPrompt(
            text="a b", token_ids=(1, 2, 3), active=12, scores=tuple(Explained(replacement=r, **about) for r in own)
        )
        for own in shares
    ]
    graphs = GraphScores(prefixes=(4, 10), max_features=1000, prompts=tuple(prompts))
    files = write_layers_report([analysis.headline() for analysis in analyses], replaced, graphs)
    markdown, (page, _, targets) = (
        read_markdown(files["layers_report.md"].decode()), read_html(files["layers_report.html"].decode()),
    )  # fmt: skip
    assert markdown.tables == page.tables
    rows = page.table("Held-out figures of every layer")[1:]
    assert [row[0].startswith("layer") for row in rows] == [True, True]
    assert rows[0][2:7] == ["0.6", "0.4512", "0.4278 to 0.4825", "0.62", "0.4512"]
    assert rows[0][7] == "4.4"
    assert "../layer2/report/layer2_analysis_report.html" in targets
    assert "(../layer2/report/layer2_analysis_report.md)" in markdown.text
    # 51.83 % of the variance of all tokens and 1.31 % of the squared error, which is 0.2512 of that variance.
    assert page.table("How massive tokens are carried")[1:] == [
        ["layer 2", "20", "2 %", "51.83 %", "1.31 %", "0.4512", "0.2512",
         number(0.2512 * analyses[0].summary.massive.error / analyses[0].summary.massive.variance), "158.2",
         number(analyses[0].summary.massive_features)],
    ]  # fmt: skip
    assert page.table("The language model with all of these layers replaced at once")[1:] == [
        ["none: the model as it is", "3", "0", "100 %"],
        ["4 features a layer", "4.5 (4.25 to 4.75)", "1.25 (1 to 1.5)", "40 % (30 % to 50 %)"],
        ["10 features a layer", "3.5 (3.25 to 3.75)", "0.5 (0.25 to 0.75)", "75 % (70 % to 80 %)"],
        ["the MLPs' mean output", "8", "not measured", "not measured"],
        ["the MLPs' output set to 0", "9", "not measured", "not measured"],
    ]
    report = LayersReport.model_validate_json(files["layers_report.json"])
    assert report.replaced == replaced and report.graphs == graphs
    assert page.table("What attribution graphs of held-out prompts explain")[1:] == [
        ["4 features a layer", "0.375 (0.25 to 0.5)", "0.75 (0.75 to 0.75)", "0.125 (0.125 to 0.125)"],
        ["10 features a layer", "0.5625 (0.5 to 0.625)", "0.75 (0.75 to 0.75)", "0.125 (0.125 to 0.125)"],
    ]
    assert "Means over 2 prompts, the first 3 tokens" in squeeze(page.text)
    assert [(each.layer, each.directory, each.summary) for each in report.layers] == [
        (a.config.model.layer, f"layer{a.config.model.layer}", a.summary) for a in reversed(analyses)
    ]
    without = write_layers_report([analyses[1].headline()], None, None)["layers_report.md"].decode()
    assert "No held-out token is massive at any of these layers" in without
    assert "replaced at once was not measured" in without
    assert "graphs of held-out prompts were not measured" in without
    assert pixels(files["layers_overview.png"]) == (680, 1080)


def test_labels_do_not_break_inside_their_quotes() -> None:
    def pieces(text: str) -> tuple[list[str], str]:
        shown = str(label_html(text))
        unbroken = re.findall(r'<span class="quoted">(.*?)</span>', shown)
        return [html.unescape(each) for each in unbroken], html.unescape(re.sub("<[^>]*>", "", shown))

    labels = {
        "' Congress' (87 %); in ' United States'": ["' Congress'", "' United States'"],
        "\" don't\" (52 %), ' it\\'s'; near ' \"we\"'": ['" don\'t"', "' it\\'s'", "' \"we\"'"],
        "' of', 'the' (2 of 3); after ' a'": ["' of'", "' a'"],  # nothing can break in 'the'
        "the speaker's thanks to Congress' members and others' guests": [],  # apostrophes quote nothing
        "in 'a phrase that is far too long for one line' (70 %)": [],
        "' <b>' & ' \u202e'": ["' <b>'", "' U+202E'"],
        "' a": [],
        "": [],
    }
    for text, expected in labels.items():
        assert pieces(text) == (expected, visible(text)), text
    assert "<b>" not in str(label_html("' <b>'"))
    assert label_html("' a' x") == Renderer(lambda _: None).text(Label("' a' x"))
