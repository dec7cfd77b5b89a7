"""The feature browser in a real browser, against what the API says. Skipped without Chromium."""

import io
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import axe_core_python
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_example import HOSTILE
from serve_local import make_analysed_run, make_layers_run, make_run, served

from mtc.report.format import short_label, spaced, visible
from serve.http import keys
from tests import chromium

AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
TEXT = "Hello <img src=x onerror=alert(1)>\nand \u202e naïve"
DONE = "document.querySelector('#status').textContent === '' && !document.querySelector('#result').hidden"
LISTED = "#list > table tbody th a"
ARROW_LEFT, ARROW_RIGHT, ENTER, TAB = ("ArrowLeft", 37), ("ArrowRight", 39), ("Enter", 13), ("Tab", 9)
ARROW_UP, ARROW_DOWN = ("ArrowUp", 38), ("ArrowDown", 40)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    with served(make_analysed_run(root / "one"), make_run(root / "two", 5)) as url:
        yield url


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.browser(path) as page:
        yield page


def encoded(url: str, text: str = TEXT, **options: Any) -> dict[str, Any]:
    body = {"inputs": text, "top_k": 64, "include": ["l0", "relative_error"]} | options
    result: dict[str, Any] = httpx.post(f"{url}/encode", json=body, timeout=60).json()["results"][0]
    # The page puts features of massive tokens, of which 8 is one, behind the others.
    result["features"] = [sorted(many, key=lambda f: f["feature_index"] == 8) for many in result["features"]]
    return result


def strongest(result: dict[str, Any]) -> dict[int, float]:
    """Each feature's strongest activation in a text."""
    best: dict[int, float] = {}
    for many in result["features"]:
        for f in many:
            best[f["feature_index"]] = max(best.get(f["feature_index"], 0), f["activation_value"])
    return best


def share(feature: int, value: float) -> float:
    """Of the feature's maximum, which report_example makes 1 + feature / 2; -1 of those that it has silent."""
    return -1 if feature in (2, 5) else value / (1 + feature / 2)


def ranking(result: dict[str, Any], without: tuple[int, ...] = (0, 8)) -> list[int]:
    """A text's features as the page lists them, without dense ones and those of massive tokens."""
    best = strongest(result)
    order = sorted(best, key=lambda i: (-share(i, best[i]), -best[i], i))
    return [i for i in order if i not in without]


def complaints(tab: chromium.Page) -> list[Any]:
    """What the browser's console has; refusals by the content security policy are there too."""
    return [e for e in tab.events if e[0] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")]


def faults(tab: chromium.Page) -> list[str]:
    """What axe calls serious or critical."""
    tab.evaluate(AXE + "; null")
    found = json.loads(tab.evaluate("axe.run().then((r) => JSON.stringify(r.violations))"))
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


def texts(tab: chromium.Page, selector: str) -> list[str]:
    found: list[str] = tab.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    return found


def show(tab: chromium.Page, url: str, text: str = TEXT, width: int = 1280, scheme: str = "light") -> None:
    """The text page after a text was typed and sent from the keyboard."""
    tab.open(f"{url}/ui", width, 900, scheme)
    tab.evaluate("document.querySelector('#text').focus(); document.querySelector('#text').select()")
    tab.type(text)
    tab.press(*ENTER, modifiers=2)
    tab.wait(DONE)


def figures(tab: chromium.Page) -> list[float]:
    return [float(tab.evaluate(f"document.querySelector('#{name}').textContent")) for name in ("l0", "relative_error")]


def means(result: dict[str, Any]) -> list[float]:
    l0 = [n for n, special in zip(result["l0"], result["is_special"], strict=True) if not special]
    relative_error = [v for v in result["relative_error"] if v is not None]
    return [sum(l0) / len(l0), sum(relative_error) / len(relative_error)]


def test_type_click_slide(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    result = encoded(url)
    shown = [t if special else visible(t) if t.strip() else spaced(t)
             for t, special in zip(result["tokens"], result["is_special"], strict=True)]  # fmt: skip
    assert texts(tab, "#tokens button") == shown
    assert tab.evaluate("document.querySelectorAll('main img, #tokens b').length") == 0
    assert figures(tab) == pytest.approx(means(result), rel=1e-3)
    assert texts(tab, "#result dt")[:3] == ["Tokens", "L0", "Relative error"]  # a mean over tokens is no FVU
    assert texts(tab, LISTED) == [str(i) for i in ranking(result)]

    strongest = [many[0]["activation_value"] if many else 0 for many in result["features"]]
    at = max(range(len(strongest)), key=strongest.__getitem__)
    marks = tab.evaluate("[...document.querySelectorAll('#tokens button')].map((b) => b.className)")
    assert marks[at] == "a5"
    assert [mark[0] == "a" for mark in marks] == [value > 0 for value in strongest]

    tab.click(f"#tokens button:nth-of-type({at + 1})")
    tab.wait("document.querySelector('#of-token table')")
    assert texts(tab, "#of-token tbody th a") == [str(f["feature_index"]) for f in result["features"][at]]
    feature = result["features"][at][0]["feature_index"]
    tab.click("#of-token tbody th a")
    tab.wait("document.querySelector('#feature article')")
    assert texts(tab, "#feature h2")[0].startswith(f"Feature {feature} ")
    rows = {t: f for t, many in enumerate(result["features"]) for f in many if f["feature_index"] == feature}
    marks = tab.evaluate("[...document.querySelectorAll('#tokens button')].map((b) => b.className)")
    assert {t for t, mark in enumerate(marks) if mark[0] == "a"} == set(rows)

    # The slider, from the keyboard, to the smaller of the two dictionaries.
    tab.evaluate("document.querySelector('#prefix').focus()")
    tab.press(*ARROW_LEFT)
    tab.wait(f"document.querySelector('#size').textContent === '4' && {DONE}")
    smaller = encoded(url, prefix=4)
    tab.wait(f"document.querySelector('#l0').textContent === {json.dumps(f'{means(smaller)[0]:.4g}')}")
    assert figures(tab) == pytest.approx(means(smaller), rel=1e-3)
    assert all(int(f) < 4 for f in texts(tab, LISTED))
    tab.click("#clear")
    assert "strongest feature" in texts(tab, "#legend")[0]

    assert complaints(tab) == []
    asked = [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"]
    assert all(address.startswith((url, "data:,")) for address in asked)
    assert not any("Hello" in address for address in asked)  # no text in what is logged


def test_keyboard_alone(tab: chromium.Page, url: str) -> None:
    show(tab, url, "one two three")
    for _ in range(4):  # the button, the slider, the tokens' one stop
        tab.press(*TAB)
        if tab.evaluate("document.activeElement.closest('#tokens') !== null"):
            break
    tokens = texts(tab, "#tokens button")
    for key in (ARROW_RIGHT, ARROW_RIGHT, ARROW_LEFT, ARROW_RIGHT):
        tab.press(*key)
    assert tab.evaluate("document.activeElement.textContent") == tokens[2]
    tab.press(*ENTER)
    tab.wait("document.querySelector('#of-token table')")
    assert tab.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    tab.press(*TAB)
    feature = tab.evaluate("document.activeElement.textContent")
    tab.press(*ENTER)
    tab.wait("document.querySelector('#feature article')")
    assert texts(tab, "#feature h2")[0].startswith(f"Feature {feature} ")
    assert tab.evaluate("document.activeElement.textContent") == feature  # the place in the list is not lost
    assert complaints(tab) == []


def test_what_is_refused_is_said(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui?model=two", 1280, 900, "light")  # a run without an analysis
    tab.click("#go")
    tab.wait(DONE)
    assert set(texts(tab, "#list tbody td:nth-child(2)")) == {""}
    tab.click(LISTED)
    tab.wait("document.querySelector('#feature article')")
    assert "run two has no analysis of its features" in texts(tab, "#feature")[0]
    tab.evaluate("document.querySelector('#text').value = 'x'.repeat(2e6)")
    tab.click("#go")
    tab.wait("!document.querySelector('#problem').hidden")
    assert "the limit is 1048576" in texts(tab, "#problem")[0]
    tab.evaluate("document.querySelector('#text').value = 'a '.repeat(3000)")
    tab.click("#go")
    tab.wait(f"document.querySelector('#problem').hidden && {DONE}")
    assert texts(tab, "#count") == ["1,024"]
    assert texts(tab, "#cut") == ["the rest was left out"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_and_axe_finds_nothing_serious(tab: chromium.Page, url: str, width: int, scheme: str) -> None:
    show(tab, url, width=width, scheme=scheme)
    tab.click("#tokens button:nth-of-type(2)")
    tab.wait("document.querySelector('#of-token table')")
    tab.click("#of-token tbody th a")
    tab.wait("document.querySelector('#feature article')")
    assert tab.evaluate("document.querySelector('#feature #note').offsetParent") is None  # it works on its own page
    pages = [
        "",
        "/ui/features",
        "/ui/map",
        "/ui/doubtful",
        "/ui/feature/3",
        "/ui/feature/8?examples=500",
        "/ui/feature/10",
    ]
    for path in pages:
        if path:
            tab.open(url + path, width, 900, scheme)
        assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width], path
        assert faults(tab) == [], path
        background = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == background
        if path != "/ui/feature/10":  # the console names what is not found
            assert complaints(tab) == [], path
    assert "there is no feature 10, the last one is 9" in texts(tab, "main")[0]


def test_features_are_filtered_and_read(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui/features?limit=4", 1280, 900, "light")
    pages = [texts(tab, "tbody th")]
    for _ in range(2):
        tab.click("a[rel=next]")
        tab.wait(
            f"document.querySelector('tbody th') && document.querySelector('tbody th').textContent !== '{pages[-1][0]}'"
        )
        pages.append(texts(tab, "tbody th"))
    assert [int(f) for page in pages for f in page] == list(range(10))
    tab.open(f"{url}/ui/features?massive=false", 1280, 900, "light")
    assert texts(tab, "tbody th") == [str(i) for i in range(10) if i != 8]
    assert texts(tab, ".badge") == []
    tab.open(f"{url}/ui/features?massive=true", 1280, 900, "light")
    assert (texts(tab, "tbody th"), texts(tab, ".badge")) == (["8"], ["massive"])
    tab.open(f"{url}/ui/features", 1280, 900, "light")
    tab.click("input[name=token]")
    tab.type(HOSTILE[3])  # a script, the top token but one of feature 3
    tab.press(*ENTER)
    tab.wait("location.search.includes('token=') && document.querySelectorAll('tbody tr').length === 1")
    assert texts(tab, "tbody th") == ["3"]
    row = httpx.get(f"{url}/features/3").json()["feature"]
    assert texts(tab, "tbody td")[0].strip() == row["label"] == "'|' (5 of 7) in 'the| of|' (5 of 7)"
    assert spaced(HOSTILE[3]) in texts(tab, "tbody td")[1]
    assert tab.evaluate("document.querySelector('input[name=token]').value") == HOSTILE[3]
    assert tab.evaluate("document.querySelectorAll('main script').length") == 0
    tab.click("tbody th a")
    tab.wait("location.pathname === '/ui/feature/3' && document.querySelector('article')")
    told = texts(tab, "article")[0]
    assert texts(tab, "h1 .label") == [row["label"]]
    for kind in ("top", "sample"):
        examples = httpx.get(f"{url}/features/3/examples", params={"kind": kind}).json()["examples"]
        assert sum(f"{e['activation']:.4g}" in told for e in examples) == len(examples) > 0
    assert all(spaced(t["token"]) in told for t in [*row["top_tokens"], *row["positive_logits"]])
    assert complaints(tab) == []
    # Parent, siblings and children, splits and absorption, as report_example has them.
    tab.open(f"{url}/ui/feature/6", 1280, 900, "light")
    names = {i: httpx.get(f"{url}/features/{i}").json()["feature"]["label"] for i in (1, 6, 7)}
    family = f"Parent 1 {names[1]} 6 {names[6]} (this one) 7 {names[7]}"
    assert " ".join(texts(tab, ".tree > li")[0].split()) == family
    (near,) = [text for text in texts(tab, "article ul li") if text.startswith("Nearest features")]
    assert f"7 {short_label(names[7])} (1)" in near
    assert "feature 1 divides into 6 7" in texts(tab, "article")[0]
    tab.click(".tree a")
    tab.wait("location.pathname === '/ui/feature/1' && document.querySelector('article')")
    assert texts(tab, ".tree > li > ul a") == ["6", "7"]
    tab.open(f"{url}/ui/feature/8", 1280, 900, "light")
    assert "feature 0 is silent on 15 of 20 tokens on which feature 8 massive fires" in texts(tab, "article")[0]
    assert texts(tab, "h1 .badge") == ["massive"]
    assert "90 % of its activation and 19.8 % of its firings fall on them" in texts(tab, "article")[0]


def test_a_text_is_tried_without_the_server_seeing_it(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui/feature/3", 1280, 900, "light")
    tab.click("#try-text")
    tab.type("a & b\u00e9=#1")
    tab.press(*ENTER)
    tab.wait("location.pathname === '/ui' && location.hash.length > 1")
    sent = "Object.fromEntries(new URLSearchParams(location.hash.slice(1)))"
    assert tab.evaluate("location.search") == "?model=one"
    assert {"text": "a & b\u00e9=#1", "feature": "3"}.items() <= tab.evaluate(sent).items()
    asked = [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"]
    assert not any("b%C3%A9" in address.partition("#")[0] for address in asked)


def test_hostile_labels_are_shown_as_text(tab: chromium.Page, tmp_path: Path) -> None:
    label = "'<img src=x onerror=alert(1)>|`' \u202e\n<script>alert(1)</script> & {{ 1 }}"
    run = make_analysed_run(tmp_path / "one")
    table = pq.read_table(Path(run.url, "features.parquet"))
    at = table.schema.get_field_index("label")
    sink = io.BytesIO()
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array([label] * len(table))), sink)
    run.write("features.parquet", sink.getvalue())
    run.publish()
    with served(run) as url:
        show(tab, url)
        assert set(texts(tab, "#list .label")) == {visible(label)}
        tab.open(f"{url}/ui/features", 390, 900, "dark")
        assert texts(tab, "tbody .label") == [visible(label)] * 10
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        for feature, places in ((6, "h1 .label, .tree .label, article ul .label"), (8, "h1 .label")):
            tab.open(f"{url}/ui/feature/{feature}", 390, 900, "dark")
            assert set(texts(tab, places)) == {visible(label)}
            assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert complaints(tab) == []


def test_runs_are_picked(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui", 1280, 900, "light")
    assert texts(tab, ".picker option") == ["one", "two"]
    tab.evaluate("document.querySelector('.picker select').value = 'two'")
    tab.click(".picker button")
    tab.wait("document.querySelector('#ask')?.dataset.model === 'two'")
    tab.wait("!document.querySelector('#go').disabled")  # its script has run
    tab.click("#go")
    tab.wait(DONE)
    result = encoded(url, "We the people of the United States, in order to form a more perfect union", model="two")
    assert figures(tab) == pytest.approx(means(result), rel=1e-3)
    assert tab.evaluate("document.querySelector('nav a:nth-child(6)').href") == f"{url}/report?model=two"


def test_layers_are_picked(tab: chromium.Page, tmp_path: Path) -> None:
    """With the keyboard, and kept in the address, the filters and the text too; of one layer there is no choice."""
    run, flat = make_layers_run(tmp_path / "deep", (2, 0, 1)), make_analysed_run(tmp_path / "flat")

    def identity() -> str:
        return texts(tab, ".identity")[0].split(":")[1].split(", ")[1]

    def pick(key: tuple[str, int], layer: int) -> None:
        tab.evaluate("document.querySelector('.layers select').focus()")
        tab.press(*key)
        tab.press(*TAB)
        tab.press(*ENTER)
        tab.wait(f"location.search.includes('layer={layer}') && document.querySelector('.layers')")

    with served(run, flat) as url:
        for width, scheme in ((1280, "light"), (390, "dark")):
            tab.open(f"{url}/ui/features?group=1&massive=false", width, 900, scheme)
            assert (texts(tab, ".layers option"), identity()) == (["0", "1", "2"], "layer 0")
            pick(ARROW_DOWN, 1)
            assert tab.evaluate("location.search") == "?group=1&massive=false&layer=1"
            assert identity() == "layer 1"
            assert faults(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            tab.click("tbody th a")
            tab.wait("location.pathname === '/ui/feature/4' && document.querySelector('article')")
            assert tab.evaluate("location.search") == "?layer=1"
            pick(ARROW_DOWN, 2)
            assert (tab.evaluate("location.pathname"), identity()) == ("/ui/feature/4", "layer 2")
            assert faults(tab) == [] and tab.evaluate("document.documentElement.scrollWidth") == width
            links = tab.evaluate(
                "[...document.querySelectorAll('article a[href^=\"/ui/feature\"]')].map((a) => a.search)"
            )
            assert set(links) == {"?layer=2"} and len(links) > 2
            reports = [f"{url}/report?layer=2", f"{url}/report"]
            found = tab.evaluate("[...document.querySelectorAll('header nav a')].slice(5, 7).map((a) => a.href)")
            assert found == reports

            tab.open(f"{url}/ui", width, 900, scheme)
            tab.wait("!document.querySelector('#go').disabled")
            tab.evaluate("document.querySelector('#text').value = 'one two three'")
            pick(ARROW_DOWN, 1)
            tab.wait(DONE)
            assert tab.evaluate("document.querySelector('#text').value") == "one two three"
            assert figures(tab) == pytest.approx(means(encoded(url, "one two three", layer=1)), rel=1e-3)
            assert figures(tab) != pytest.approx(means(encoded(url, "one two three")), rel=1e-3)
            tab.click(LISTED)
            tab.wait("document.querySelector('#feature article .own a')")
            assert tab.evaluate("document.querySelector('#feature .own a').search") == "?model=deep&layer=1"
            assert complaints(tab) == []
            assert not any("three" in e.get("request", {}).get("url", "") for _, e in tab.events)
            tab.open(f"{url}/ui/features?model=deep/layer2", width, 900, scheme)
            assert tab.evaluate("document.querySelector('.picker select').value") == "deep"
            pick(ARROW_UP, 1)
            assert tab.evaluate("location.search") == "?model=deep&layer=1"
            tab.open(f"{url}/ui?model=flat", width, 900, scheme)
            assert texts(tab, ".layers") == []


def test_documentation(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/docs", 1280, 900, "light")
    tab.wait("document.querySelectorAll('.opblock').length > 10")
    listed = texts(tab, ".opblock-summary-path")
    document = httpx.get(f"{url}/openapi.json").json()
    paths = [path for path, methods in document["paths"].items() for _ in methods]
    assert sorted(path.replace("\u200b", "") for path in listed) == sorted(paths)
    tab.click("#operations-activations-encode .opblock-summary-control")
    tab.wait("document.querySelector('.try-out__btn')")
    tab.click(".try-out__btn")
    tab.wait("document.querySelector('.execute')")
    tab.click(".execute")
    tab.wait("document.querySelector('.live-responses-table tbody .response-col_status')")
    assert texts(tab, ".live-responses-table tbody td.response-col_status")[0].strip().startswith("200")
    assert complaints(tab) == []


def test_logging_in(tab: chromium.Page, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = keys.add_key(file, "someone", admin=False, expires=date(2999, 1, 1))
    with served(make_analysed_run(tmp_path / "one"), api_keys_file=str(file)) as url:
        tab.open(f"{url}/ui/feature/3?examples=1", 390, 844, "dark")
        assert tab.evaluate("location.pathname") == "/ui/login"
        assert faults(tab) == []
        tab.click("input[name=key]")
        tab.type("mtc_wrong")
        tab.press(*ENTER)
        tab.wait("document.querySelector('#problem')")
        tab.click("input[name=key]")
        tab.type(key)
        tab.press(*ENTER)
        tab.wait("location.pathname === '/ui/feature/3' && document.querySelector('article')")
        assert tab.evaluate("location.search") == "?examples=1"
        assert tab.evaluate("document.cookie") == ""
        tab.open(f"{url}/ui", 1280, 900, "light")
        tab.click("#go")
        tab.wait(DONE)
        assert complaints(tab) == []
        tab.click("form[action='/ui/logout'] button")
        tab.wait("location.pathname === '/ui/login' && document.querySelector('input[name=key]')")
        tab.open(f"{url}/ui#text=one+two", 1280, 900, "light")
        assert tab.evaluate("location.pathname") == "/ui/login"
        for typed in ("mtc_wrong", key):  # a shared link outlasts logging in
            refused = json.dumps(typed == key)
            tab.wait(f"document.querySelector('input[name=key]') && {refused} === !!document.querySelector('#problem')")
            tab.click("input[name=key]")
            tab.type(typed)
            tab.press(*ENTER)
        tab.wait(f"location.pathname === '/ui' && {DONE}")
        assert tab.evaluate("document.querySelector('#text').value") == "one two"
