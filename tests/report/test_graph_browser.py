"""The page of an attribution graph in a real browser. Skipped without Chromium."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

from mtc.report.graph_page import graph_page
from tests import chromium
from tests.graph_example import HOSTILE, PREFIXES, SHORT, make_graph, make_labelled, names_of, sums_of

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Home": 36}
KEYS |= {"End": 35, " ": 32, "f": 70, "g": 71, "i": 73, "o": 79, "Tab": 9}
GRAPH, LARGE = make_graph(), make_graph(500, 20)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory: Path = tmp_path_factory.mktemp("graphs")
    graphs = {"graph": GRAPH, "small": make_graph(10, 2), "large": LARGE, "hostile": make_graph(80, tokens=HOSTILE)}
    graphs["labelled"] = make_labelled()
    for name, graph in graphs.items():
        (directory / name).with_suffix(".html").write_text(
            graph_page(graph, "/ui/features/{layer}/{feature}?model={run}")
        )
    return {name: (directory / name).with_suffix(".html").as_uri() for name in graphs}


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.browser(path) as page:
        yield page


def complaints(tab: chromium.Page) -> list[Any]:
    return [e for e in tab.events if e[0] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]


def marks(tab: chromium.Page) -> set[str]:
    return set(tab.evaluate("[...document.querySelectorAll('.graph-plot [data-name]')].map((e) => e.dataset.name)"))


def edges(tab: chromium.Page) -> dict[tuple[str, str], float]:
    found = (
        "[...document.querySelectorAll('.edges path')].map((e) => [e.dataset.from, e.dataset.to, +e.dataset.weight])"
    )
    return {(source, target): weight for source, target, weight in tab.evaluate(found)}


def test_labels_are_short_below_a_mark_and_whole_where_it_is_spoken_of(
    tab: chromium.Page, urls: dict[str, str]
) -> None:
    tab.open(urls["labelled"], 1280, 900, "light")
    tab.wait("document.querySelector('.graph-plot [data-name]')")
    found = (
        "[...document.querySelectorAll('.graph-plot .mark')].map((e) => [e.getAttribute('aria-label'), e.textContent])"
    )
    seen = set[str]()
    for told, below in tab.evaluate(found):
        label = next((label for label in sorted(SHORT, key=len, reverse=True) if f": {label}" in told), None)
        if label is None:  # no feature, or one that is not active, of which the graph knows nothing
            continue
        short = SHORT[label]
        start = below.split(" +")[0].removesuffix("…")
        assert start == "" or short.startswith(start.strip())
        seen |= {short} if start else set()
    assert len(seen) == len(SHORT)
    assert complaints(tab) == []


def slide(tab: chromium.Page, n: int, value: float) -> None:
    """As if a reader moved the n-th slider."""
    script = f"const s = document.querySelectorAll('.graph-tools input')[{n}]; s.value = {value}"
    tab.evaluate(f"(() => {{ {script}; s.dispatchEvent(new Event('input')); }})()")


def focus(tab: chromium.Page, name: str) -> None:
    tab.evaluate(f"document.querySelector('[data-name={json.dumps(name)}]').focus()")


def focused(tab: chromium.Page) -> str | None:
    name: str | None = tab.evaluate("document.activeElement.dataset.name ?? null")
    return name


def press(tab: chromium.Page, key: str) -> None:
    tab.press(key, KEYS[key])


def fragment(tab: chromium.Page) -> str:
    found: str = tab.evaluate("location.hash")
    return found


def show_all(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}#nodes=1&edges=1", 1280, 900, "light")


@pytest.mark.parametrize("name", ["graph", "large"])
def test_folded_edges_are_sums(tab: chromium.Page, urls: dict[str, str], name: str) -> None:
    """At every prefix, against sums in Python; and of a graph that is too large to draw, by the page's own function."""
    graph = {"graph": GRAPH, "large": LARGE}[name]
    show_all(tab, urls[name])
    counts = []
    for i, prefix in enumerate(PREFIXES):
        names = names_of(graph, prefix)
        if name == "graph":
            slide(tab, 0, i)
            assert marks(tab) == set(names)
            drawn = edges(tab)
        else:
            script = "graphFold.fold(JSON.parse(document.getElementById('graph-data').textContent), { prefix: %d })"
            script = f"{script % prefix}.edges.map((e) => [e.from.name, e.to.name, e.weight])"
            drawn = {(source, target): weight for source, target, weight in tab.evaluate(script)}
        assert drawn == pytest.approx(sums_of(graph, names), abs=1e-9)
        counts.append(len(set(names)))
    assert counts[0] < counts[1] < counts[2] == len(graph.nodes)
    kinds = {each[0] for each in names_of(graph, PREFIXES[0])}
    assert kinds == set("tefxgl")


def test_what_is_unfolded_grouped_and_chosen_is_in_the_link(tab: chromium.Page, urls: dict[str, str]) -> None:
    show_all(tab, urls["graph"])
    slide(tab, 0, 0)
    folded = names_of(GRAPH, PREFIXES[0])
    own = {f"f.{n.layer}.{n.token}.{n.feature}" for n in GRAPH.nodes if n.kind == "feature"}
    parents = [n for n in sorted(set(folded)) if n[0] == "f" and folded.count(n) > (n in own)]
    others = max((n for n in folded if n[0] == "x"), key=folded.count)
    opened = [parents[0], others]
    for name in opened:
        focus(tab, name)
        press(tab, "f")
    unfolded = names_of(GRAPH, PREFIXES[0], opened)
    assert len(set(unfolded)) > len(set(folded))
    assert marks(tab) == set(unfolded)
    assert edges(tab) == pytest.approx(sums_of(GRAPH, unfolded), abs=1e-9)

    chosen = [parents[1], "t.1", next(n for n in folded if n[0] == "e")]
    for name in chosen:
        focus(tab, name)
        press(tab, " ")
    press(tab, "g")
    tab.type("a ~ <b>group</b> & %7E")
    press(tab, "Enter")
    grouped = names_of(GRAPH, PREFIXES[0], opened, [chosen])
    assert marks(tab) == set(grouped) and "h.0" in grouped
    assert edges(tab) == pytest.approx(sums_of(GRAPH, grouped), abs=1e-9)
    assert "a ~ <b>group</b> & %7E" in tab.evaluate("document.querySelector('.graph-panel h3').textContent")

    slide(tab, 1, 0.9)
    slide(tab, 2, 0.7)
    link, before = (
        fragment(tab),
        [marks(tab), edges(tab), tab.evaluate("document.querySelector('.graph-panel').innerText")],
    )
    assert edges(tab).items() < sums_of(GRAPH, grouped).items() or len(edges(tab)) < len(sums_of(GRAPH, grouped))
    tab.open(urls["graph"] + link, 1280, 900, "light")
    assert [marks(tab), edges(tab), tab.evaluate("document.querySelector('.graph-panel').innerText")] == before
    assert fragment(tab) == link

    # A finer dictionary keeps the group whole: what was folded into its members stays in it.
    slide(tab, 1, 1)
    slide(tab, 2, 1)
    slide(tab, 0, 2)
    assert marks(tab) == set(names_of(GRAPH, PREFIXES[2], opened, [chosen]))
    slide(tab, 0, 0)
    tab.evaluate(
        "[...document.querySelectorAll('.graph-panel button')].find((b) => b.textContent === 'Ungroup').click()"
    )
    assert marks(tab) == set(unfolded)
    tab.evaluate("document.querySelector('.graph-tools button').click()")
    assert marks(tab) == set(folded)
    # A link that is followed within the page, and one that is broken.
    wait = "new Promise((done) => { addEventListener('hashchange', () => setTimeout(done)); location.hash = %s; })"
    tab.evaluate(wait % json.dumps(link))
    assert marks(tab) == before[0]
    tab.evaluate(wait % json.dumps("#prefix=7&nodes=x&edges=9&open=&at=nothing&group=~&other=1"))
    assert marks(tab) and complaints(tab) == []


def test_pruning_keeps_targets_and_the_strongest(tab: chromium.Page, urls: dict[str, str]) -> None:
    show_all(tab, urls["graph"])
    slide(tab, 0, 2)
    slide(tab, 1, 0.5)
    names = names_of(GRAPH, PREFIXES[2])
    sizes = {name: node.influence for name, node in zip(names, GRAPH.nodes, strict=True) if not node.target}
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    kept: list[str] = []
    while sum(sizes[name] for name in kept) < 0.5 * sum(sizes.values()):
        kept.append(ranked[len(kept)])
    assert marks(tab) == {*kept, *(name for name in names if name not in sizes)}
    assert all(source in marks(tab) and target in marks(tab) for source, target in edges(tab))
    # What a link leads to is shown, however weak.
    focus(tab, "l.3.10")
    press(tab, "Enter")
    links = tab.evaluate("[...document.querySelectorAll('.graph-panel a[data-at]')].map((a) => a.dataset.at)")
    name = next((each for each in links if each not in marks(tab)), links[0])
    tab.evaluate(f"document.querySelector('.graph-panel a[data-at={json.dumps(name)}]').click()")
    assert name in marks(tab)


def test_everything_goes_by_keyboard(tab: chromium.Page, urls: dict[str, str]) -> None:
    show_all(tab, urls["graph"])
    tab.evaluate("document.querySelector('.graph-keys summary').focus()")
    press(tab, "Tab")
    press(tab, "Home")
    seen = [focused(tab)]
    while True:  # to the right through all marks
        press(tab, "ArrowRight")
        if focused(tab) == seen[-1]:
            break
        seen.append(focused(tab))
    assert len(seen) == len(set(seen)) and set(seen) == marks(tab)
    press(tab, "ArrowLeft")
    assert focused(tab) == seen[-2]
    press(tab, "End")
    top = focused(tab)
    press(tab, "ArrowDown")
    assert focused(tab) != top
    press(tab, "ArrowUp")
    assert str(focused(tab))[0] in "lg"
    focus(tab, "l.3.10")
    press(tab, "i")
    (strongest,) = [
        s
        for (s, t), w in edges(tab).items()
        if t == "l.3.10" and abs(w) == max(abs(v) for (_, r), v in edges(tab).items() if r == t)
    ]
    assert focused(tab) == strongest
    press(tab, "Enter")
    assert f"at={strongest}" in fragment(tab)
    assert tab.evaluate("document.activeElement.matches('.graph-panel h3')")
    first = tab.evaluate("document.querySelector('.graph-panel a[data-at]').dataset.at")
    for _ in range(8):
        press(tab, "Tab")
        if tab.evaluate("document.activeElement.dataset.at ?? null") == first:
            break
    press(tab, "Enter")
    assert f"at={first}" in fragment(tab)
    press(tab, "Escape")
    assert focused(tab) == first
    press(tab, "Escape")
    assert "at=" not in fragment(tab) and complaints(tab) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["small", "graph", "large", "hostile"])
def test_at_every_width_and_with_texts_that_mean_harm(
    tab: chromium.Page, urls: dict[str, str], name: str, scheme: str
) -> None:
    for width in (1280, 360):
        tab.open(urls[name], width, 900, scheme)
        assert [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"] == [
            urls[name]
        ]
        # Opens one after another of everything that there is: all texts were on the page.
        for each in sorted(marks(tab))[:: 1 if name == "hostile" else 15]:
            click = "dispatchEvent(new MouseEvent('click', { bubbles: true }))"
            tab.evaluate(f"document.querySelector('[data-name={json.dumps(each)}]').{click}")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate("document.querySelectorAll('img, #graph script, #graph b, #graph style').length") == 0
        assert complaints(tab) == []
        touching = """(() => {
          const texts = [...document.querySelectorAll('.graph-plot .mark > text')];
          const boxes = texts.map((t) => t.getBoundingClientRect());
          return boxes.flatMap((a, i) => boxes.slice(0, i).filter((b) =>
            a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2)).length;
        })()"""
        assert tab.evaluate(touching) == 0
        tab.evaluate(AXE + "; null")
        found = json.loads(tab.evaluate("axe.run().then((r) => JSON.stringify(r.violations))"))
        assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")] == []
    if name == "hostile":
        assert "‮" not in tab.evaluate("document.body.innerText")


def test_the_service_gives_addresses_and_ablations(tab: chromium.Page, urls: dict[str, str]) -> None:
    show_all(tab, urls["graph"])
    focus(tab, "t.1")
    press(tab, "Enter")
    buttons = "[...document.querySelectorAll('.graph-buttons button')].map((b) => b.textContent)"
    assert tab.evaluate(buttons) == ["Choose for a group"]  # nobody can take it out
    tab.evaluate(
        """(() => {
          const graph = JSON.parse(document.getElementById("graph-data").textContent);
          window.asked = [];
          const ablate = async (nodes) => {
            asked.push(nodes);
            if (asked.length > 1) throw new Error("too <b>much</b>");
            return "−3";
          };
          window.drawn = mtcGraph.draw(graph, { ablate, featureUrl: "/f/{run}/{layer}/{feature}" });
        })()"""
    )
    slide(tab, 0, 2)
    feature = next(f"f.{n.layer}.{n.token}.{n.feature}" for n in GRAPH.nodes if n.kind == "feature")
    _, layer, token, index = feature.split(".")
    focus(tab, feature)
    press(tab, "Enter")
    link = "[...document.querySelectorAll('.graph-panel a')].map((a) => a.getAttribute('href'))"
    assert f"/f/one%2Flayer%3C1%3E/{layer}/{index}" in tab.evaluate(link)
    for answer in ("−3", "too <b>much</b>"):
        assert tab.evaluate(buttons)[0] == "Take it out of the model"
        tab.evaluate("document.querySelector('.graph-buttons button').click()")
        tab.wait(f"document.querySelector('.graph-answer').textContent === {json.dumps(answer)}")
    (asked,) = tab.evaluate("asked[0]")
    assert (asked["layer"], asked["token"], asked["feature"]) == (int(layer), int(token), int(index))
    tab.evaluate("drawn.destroy()")
    assert tab.evaluate("document.getElementById('graph').childElementCount") == 0


def test_groups_are_made_without_a_keyboard_renamed_and_joined(tab: chromium.Page, urls: dict[str, str]) -> None:
    show_all(tab, urls["graph"])
    button = "[...document.querySelectorAll('.graph-panel button')].find((b) => b.textContent === '%s').click()"
    for name in ("t.1", "t.2"):
        tab.click(f"[data-name='{name}']")
        tab.evaluate(button % "Choose for a group")
    tab.evaluate("document.querySelector('.graph-picked input').value = 'words'")
    tab.evaluate(button % "Group")
    assert {"h.0"} == {name for name in marks(tab) if name[0] == "h"} and "group=words" in fragment(tab)
    tab.evaluate("document.querySelector('.graph-panel .graph-name input').value = 'names'")
    tab.evaluate(button % "Rename")
    assert "group=names" in fragment(tab) and "Group names, 2 nodes" in tab.evaluate("document.body.textContent")
    for name in ("h.0", "t.3"):  # a group and one more are one group
        focus(tab, name)
        press(tab, " ")
    press(tab, "g")
    press(tab, "Enter")
    assert marks(tab) == set(names_of(GRAPH, PREFIXES[0], groups=[["t.1", "t.2", "t.3"]]))
    assert edges(tab) == pytest.approx(sums_of(GRAPH, names_of(GRAPH, PREFIXES[0], groups=[["t.1", "t.2", "t.3"]])))
    for name in ("e.", "f."):  # what is chosen and not grouped
        focus(tab, next(each for each in sorted(marks(tab)) if each.startswith(name)))
        press(tab, " ")
    tab.evaluate(button % "Choose none")
    assert tab.evaluate("document.querySelectorAll('.picked, .graph-picked').length") == 0
