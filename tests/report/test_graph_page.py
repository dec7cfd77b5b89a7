"""An attribution graph as a page and as a drawing: what they hold, and that no text in it breaks out."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from mtc.circuits.coarse import coarsen
from mtc.report.format import short_label
from mtc.report.graph_page import GRAPH_SCRIPTS, GRAPH_STYLES, graph_page
from mtc.report.graph_plot import resolutions
from mtc.report.graph_svg import graph_svg
from mtc.results import Graph
from tests.graph_example import HOSTILE, PREFIXES, SHORT, make_graph, make_labelled
from tests.report_pages import read_html

SVG = "{http://www.w3.org/2000/svg}"


def test_the_page_holds_the_graph_and_nothing_else_runs() -> None:
    graph = make_graph(tokens=HOSTILE)
    page = graph_page(graph, "/ui/features/{feature}?model={run}&x=\"'<")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2 and page.count("</script") == 2 and "<img" not in page
    assert Graph.model_validate_json(scripts[0]) == graph and json.loads(scripts[0])["tokens"] == HOSTILE
    _, _, targets = read_html(page)
    assert targets == ["#graph"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert 'data-feature-url="/ui/features/{feature}?model={run}&amp;x=&#34;&#39;&lt;"' in page
    assert graph_page(graph) == graph_page(graph)


def test_the_service_has_what_its_page_needs() -> None:
    from serve.http.pages import static_files

    assert {*GRAPH_SCRIPTS, *GRAPH_STYLES} <= {*static_files()}


def test_labels_are_short_in_the_drawing_and_whole_in_its_titles() -> None:
    assert {label: short_label(label) for label in SHORT} == SHORT
    assert short_label("'\u202e\n'") == "'U+202E⏎'"
    drawing = ElementTree.fromstring(graph_svg(make_labelled(), labels=100))
    seen = set[str]()
    for mark in (g for g in drawing.iter(f"{SVG}g") if g.findtext(f"{SVG}title", "").startswith("feature")):
        title, shown = mark.findtext(f"{SVG}title", ""), mark.findtext(f"{SVG}text")
        short = SHORT[title.split(": ", 1)[1]]
        if shown is not None:
            assert shown == short or short.startswith(shown.removesuffix("…"))
            seen.add(short)
    assert len(seen) == len(SHORT)


@pytest.mark.parametrize(("nodes", "layers"), [(8, 2), (60, 6), (600, 24)])
def test_the_drawing_has_the_strongest_nodes_and_few_labels(nodes: int, layers: int) -> None:
    graph = make_graph(nodes, layers, tokens=HOSTILE if nodes > 20 else ("a", "b"))
    drawing = ElementTree.fromstring(graph_svg(graph, labels=12, edges=50, marks=10**6))
    marks = [g for g in drawing.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    assert len(marks) == len(graph.nodes)
    labels = [text for text in drawing.iter(f"{SVG}text") if text.get("class") == "label"]
    assert 2 <= len(labels) <= 12
    assert any((label.text or "").startswith("␣next0 50 %") for label in labels)
    lines = [path for path in drawing.iter(f"{SVG}path") if path.get("class") in ("plus", "minus")]
    assert len(lines) == min(50, len(graph.edges))
    assert drawing[0].tag == f"{SVG}title" and drawing[1].tag == f"{SVG}desc"
    assert "capital" not in (drawing[0].text or "") and "nodes" in (drawing[1].text or "")
    assert {child.tag for child in drawing.iter()} <= {
        f"{SVG}{n}" for n in ["svg", "title", "desc", "style", "rect", "text", "g", "path", "circle"]
    }
    assert graph_svg(graph) == graph_svg(graph)
    few = ElementTree.fromstring(graph_svg(graph, marks=10))
    titles = [g.findtext(f"{SVG}title", "") for g in few.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    inner = sorted((n for n in graph.nodes if not n.target and n.kind != "embedding"), key=lambda n: -n.influence)
    assert len(titles) == len(graph.nodes) - len(inner[10:])
    names = [
        f"{n.kind} {'' if n.feature is None else n.feature}".strip() + f" of layer {n.layer} at token {n.token}"
        for n in inner
    ]
    for name in names[:10]:
        assert any(title.startswith(name) for title in titles)
    assert f"The {len(titles)} strongest of {len(graph.nodes)} nodes" in (few[1].text or "")


def test_marks_of_a_drawing_do_not_lie_on_each_other() -> None:
    graph = make_graph(500, 20)
    drawing = ElementTree.fromstring(graph_svg(graph, marks=10**6))
    places = [
        tuple(float(v) for v in re.findall(r"-?[\d.]+", g.get("transform", "")))
        for g in drawing.iter(f"{SVG}g")
        if g.find(f"{SVG}title") is not None
    ]
    width, height = (float(drawing.get(name, 0)) for name in ("width", "height"))
    assert all(0 < x < width and 0 < y < height for x, y in places)
    close = [
        (a, b) for i, a in enumerate(places) for b in places[:i] if abs(a[0] - b[0]) < 12 and abs(a[1] - b[1]) < 12
    ]
    assert close == []


def test_a_coarse_graph_is_drawn_with_what_its_nodes_stand_for() -> None:
    coarse = coarsen(make_graph(), PREFIXES[0])
    drawing = ElementTree.fromstring(graph_svg(coarse))
    marks = [g for g in drawing.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    rings = [mark for mark in marks if any(c.get("class") == "ring" for c in mark)]
    assert len(rings) == sum(node.kind == "feature" and node.folded > 0 for node in coarse.nodes) > 0
    titles = [mark.findtext(f"{SVG}title", "") for mark in marks]
    assert sum(title.startswith("others of layer") for title in titles) == sum(n.kind == "others" for n in coarse.nodes)
    assert any("folded in" in title for title in titles)
    graph_page(coarse)


def test_the_plot_of_resolutions_shows_where_influence_ends() -> None:
    graph = make_graph(tokens=HOSTILE)
    drawing = resolutions(graph)
    assert drawing == resolutions(graph) and drawing.png.startswith(b"\x89PNG")
    root = ElementTree.fromstring(drawing.svg)
    said = [text.text for text in root.iter(f"{SVG}text")]
    for score in graph.scores:
        assert f"the first {score.prefix} features" in said
    assert said.count("with 20 folded in") == len(PREFIXES)
    green = [path.get("d", "") for path in root.iter(f"{SVG}path") if "fill: #009e73" in path.get("style", "")]
    widths = []
    for path in green[: 2 * len(PREFIXES)]:  # the legend's own comes last
        xs = [float(x) for x in re.findall(r"[ML] (\S+) \S+", path)]
        widths.append(max(xs) - min(xs))
    shares = [each.replacement for score in graph.scores for each in (score, score.folded)]
    assert [width / widths[0] for width in widths] == pytest.approx([share / shares[0] for share in shares], rel=1e-3)
