"""The text page's ranking, link and nested dictionaries, against the API's own numbers. Skipped without Chromium."""

# ruff: noqa: F811  (`tab` and `url` are fixtures of test_serve_ui.py)

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serve_local import make_analysed_run, make_config, make_run, served
from test_serve_ui import (  # tab and url are fixtures
    ARROW_LEFT,
    DONE,
    LISTED,
    TEXT,
    complaints,
    encoded,
    faults,
    figures,
    means,
    ranking,
    share,
    show,
    strongest,
    tab,  # noqa: F401
    texts,
    url,  # noqa: F401
)

from mtc.storage import RunDirectory
from tests import chromium

PARENTS = {6: 1, 7: 1, 8: 0}  # as report_example has them
HOSTILE = "<img src=x onerror=alert(1)>"
SPLIT = 4  # where the second of the two dictionaries begins


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of a run in which feature 9 is a copy of 5, as its weights are."""
    run = make_analysed_run(tmp_path_factory.mktemp("runs") / "one")
    table = pq.read_table(Path(run.url, "features.parquet"))
    at = table.schema.get_field_index("copy_of")
    field, sink = table.schema.field(at), io.BytesIO()
    pq.write_table(table.set_column(at, field, pa.array([None] * 9 + [5], field.type)), sink)
    run.write("features.parquet", sink.getvalue())
    run.publish()
    with served(run) as url:
        yield url


def rows(tab: chromium.Page, selector: str) -> list[list[str]]:
    """A table's cells, as they are read."""
    script = "[...document.querySelectorAll(%s)].map((row) => [...row.cells].map((cell) => cell.textContent))"
    found: list[list[str]] = tab.evaluate(script % json.dumps(selector))
    return found


def shared(tab: chromium.Page) -> dict[str, str]:
    """What the address has behind the #."""
    return {name: value for name, (value,) in parse_qs(tab.evaluate("location.hash")[1:]).items()}


def percent(value: float) -> str:
    return "–" if value < 0 else f"{100 * value:,.0f} %"


def test_features_of_the_text_stand_by_their_own_maximum(tab: chromium.Page, copied: str) -> None:
    show(tab, copied)
    result = encoded(copied)
    best, listed = strongest(result), ranking(result)
    assert {0, 5, 8, 9} <= {*best} and listed.index(9) < listed.index(5)  # 5 has no maximum, and 9 is folded into it
    heads = [i for i in listed if i != 9]
    assert heads != sorted(heads, key=lambda i: -best[i])
    found = rows(tab, "#list > table tbody tr")
    assert [row[0] for row in found] == [str(i) for i in heads]
    assert [row[3] for row in found] == [percent(share(i, best[i])) for i in heads]
    assert [float(row[4]) for row in found] == pytest.approx([best[i] for i in heads], rel=1e-3)
    count = {i: sum(any(f["feature_index"] == i for f in many) for many in result["features"]) for i in best}
    assert [int(row[5]) for row in found] == [count[i] for i in heads]
    folded = found[heads.index(5)][1]
    assert "and a copy of it" in folded and f"9 {best[9]:.4g} on {count[9]} token" in folded
    assert tab.evaluate("document.querySelector('#list > table details').open") is False
    # Those of massive tokens are folded away; dense ones come when they are asked for.
    assert tab.evaluate("document.querySelector('#list .massive').open") is False
    assert texts(tab, "#list .massive tbody th") == ["8"]
    assert texts(tab, "#dense-count") == [", 1 here"]
    tab.click("#dense")
    assert texts(tab, LISTED) == [str(i) for i in ranking(result, without=(8, 9))]
    assert complaints(tab) == []


def test_hover_and_focus_show_a_token_and_links_open_pages(tab: chromium.Page, url: str) -> None:
    show(tab, url, "one two three")
    result = encoded(url, "one two three")
    assert texts(tab, "#of-token tbody th") == []

    def hover(selector: str) -> None:
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = tab.evaluate(f"(() => {{ const b = {box}; return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def told(t: int) -> str:
        tab.wait(f"document.querySelector('#of-token-title').textContent.startsWith('Token {t},')")
        assert texts(tab, "#of-token tbody th") == [str(f["feature_index"]) for f in result["features"][t]]
        pressed: str = tab.evaluate("document.querySelector('#tokens [aria-pressed=true]')?.dataset.token")
        return pressed

    assert any(result["features"][1]) and result["features"][1] != result["features"][2] != result["features"][3]
    hover("#tokens [data-token='2']")
    assert told(2) is None
    hover("h1")
    assert told(2) is None  # it can be read, and its links reached
    tab.click("#tokens [data-token='3']")
    hover("#tokens [data-token='1']")
    assert told(1) == "3"
    hover("h1")
    assert told(3) == "3"  # the chosen one again
    tab.press(*ARROW_LEFT)
    assert told(2) == "3"

    feature = result["features"][2][0]["feature_index"]
    assert tab.evaluate("document.querySelector('#of-token tbody a').href") == f"{url}/ui/feature/{feature}?model=one"
    script = "new MouseEvent('click', {bubbles: true, cancelable: true, ctrlKey: true})"
    left = f"!document.querySelector('#of-token tbody a').dispatchEvent({script})"
    assert tab.evaluate(f"addEventListener('click', (e) => e.preventDefault(), {{once: true}}); {left}") is True
    assert "feature" not in shared(tab)  # it opened a tab of its own, but for the line above
    assert complaints(tab) == []


def test_the_link_restores_what_is_shown_and_back_goes_back(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    result = encoded(url)
    assert shared(tab) == {"text": TEXT, "prefix": "10"}
    t = next(t for t, many in enumerate(result["features"]) if many)
    tab.click(f"#tokens [data-token='{t}']")
    feature = result["features"][t][0]["feature_index"]
    tab.click("#of-token tbody a")
    tab.wait("document.querySelector('#feature article')")
    tab.evaluate("document.querySelector('#prefix').focus()")
    tab.press(*ARROW_LEFT)
    whole = {"text": TEXT, "prefix": "4", "token": str(t), "feature": str(feature)}
    assert shared(tab) == whole
    # A copy names the run, which `latest` may not name tomorrow.
    tab.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }; null")
    tab.click("#copy")
    tab.wait("document.querySelector('#status').textContent === 'The link is copied.'")
    link = tab.evaluate("window.copied")
    assert link.startswith(f"{url}/ui?model=one#")
    tab.evaluate("navigator.clipboard.writeText = async () => { throw new Error(); }; null")
    tab.click("#copy")
    tab.wait("!document.querySelector('#link').hidden")
    assert tab.evaluate("[document.querySelector('#link').value, getSelection().toString()]") == [link, link]

    def state() -> list[Any]:
        marked = "document.querySelector('#tokens [aria-pressed=true]')?.dataset.token ?? null"
        shown = "document.querySelector('#feature h2')?.textContent.match(/[0-9]+/)[0] ?? null"
        size = "document.querySelector('#size').textContent"
        found: list[Any] = tab.evaluate(f"[document.querySelector('#text').value, {size}, {marked}, {shown}]")
        return found

    tab.evaluate("history.back()")
    tab.wait("document.querySelector('#size').textContent === '10'")
    assert state() == [TEXT, "10", str(t), str(feature)]
    tab.evaluate("history.back()")
    tab.wait("document.querySelector('#feature h2') === null")
    assert state() == [TEXT, "10", str(t), None]
    tab.evaluate("history.back()")
    tab.wait("document.querySelector('#tokens [aria-pressed=true]') === null")
    tab.evaluate("history.back()")
    tab.wait("document.querySelector('#result').hidden")
    tab.evaluate("history.forward()")
    tab.wait(DONE)
    assert state() == [TEXT, "10", None, None]

    tab.open(link, 390, 900, "dark")
    tab.wait(f"document.querySelector('#feature h2') && {DONE}")
    assert state() == list(whole[name] for name in ("text", "prefix", "token", "feature"))
    assert figures(tab) == pytest.approx(means(encoded(url, prefix=4)), rel=1e-3)
    tab.evaluate(f"location.hash = {json.dumps('#' + urlencode({'text': 'one two'}))}")
    tab.wait(f"document.querySelectorAll('#tokens button').length === {len(encoded(url, 'one two')['tokens'])}")
    assert state() == ["one two", "10", None, None]
    assert complaints(tab) == []
    asked = [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"]
    assert asked and not any("Hello" in address or "two" in address for address in asked)


@pytest.mark.parametrize(
    ("fragment", "told"),
    [
        ({"token": "9"}, "token must be below 4, the number of tokens, and is 9"),
        ({"feature": "10"}, 'feature must be a whole number below 10 and is "10"'),
        ({"feature": HOSTILE}, f'below 10 and is "{HOSTILE}"'),
        ({"prefix": "7"}, "prefix must be one of 4, 10 and is 7"),
        ({"token": "-1", "prefix": "1e1"}, 'token must be a whole number and is "-1"; prefix must be'),
        ({"text": HOSTILE + "\u202e\x00", "token": "1"}, ""),
    ],
)
def test_links_that_do_not_fit_or_mean_harm(tab: chromium.Page, url: str, fragment: dict[str, str], told: str) -> None:
    fragment = {"text": "you"} | fragment
    tab.open(f"{url}/ui#{urlencode(fragment)}", 1280, 900, "light")
    tab.wait(DONE)
    assert told in texts(tab, "#problem")[0]
    assert tab.evaluate("document.querySelector('#problem').hidden") is (told == "")
    assert tab.evaluate("document.querySelector('#text').value") == fragment["text"]
    assert len(texts(tab, "#tokens button")) == len(encoded(url, fragment["text"])["tokens"])
    assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert shared(tab) == fragment
    assert complaints(tab) == []


def test_a_text_too_long_for_a_link(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui", 1280, 900, "light")
    tab.evaluate("document.querySelector('#text').value = 'a '.repeat(10001)")
    tab.click("#go")
    tab.wait(DONE)
    assert tab.evaluate("location.hash") == ""
    for count in (60, 120):  # the table grows by so many tokens
        assert len(texts(tab, "#nested-table tbody tr")) == count
        tab.click("#nested-more")
    tab.click("#copy")
    assert texts(tab, "#status") == ["This text has 20002 characters; a link holds 20000."]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_nested_dictionaries_side_by_side(tab: chromium.Page, url: str, width: int, scheme: str) -> None:
    show(tab, url, width=width, scheme=scheme)
    answers = [encoded(url, prefix=prefix) for prefix in (SPLIT, 10)]
    own = [t for t, special in enumerate(answers[0]["is_special"]) if not special]
    assert texts(tab, "#nested-means dt") == ["First 4", "First 10"]
    mean = [float(value) for value in texts(tab, "#nested-means strong")]
    assert mean == pytest.approx([means(answer)[1] for answer in answers], abs=5.1e-4)
    assert [int(row.split()[-1]) for row in texts(tab, "#nested-table tbody th small")] == own
    errors = [float(value) for value in texts(tab, "#nested-table td b")]
    assert errors == pytest.approx([answer["relative_error"][t] for t in own for answer in answers], abs=5.1e-4)

    # Each cell: (parent, child) of those that refine an active feature, then the others that the prefix adds.
    refined = 0
    for row, t in enumerate(own):
        for column, answer in enumerate(answers):
            active = [f["feature_index"] for f in answer["features"][t]]
            new = {i for i in active if i >= column * SPLIT}
            pairs = {(PARENTS[i], i) for i in new if PARENTS.get(i) in active}
            cell = f"#nested-table tbody tr:nth-child({row + 1}) td:nth-child({column + 2})"
            families = tab.evaluate(
                f"[...document.querySelectorAll('{cell} .family')].map((f) => [f, ...f.querySelectorAll('li')]"
                ".map((e) => Number(e.querySelector('a').textContent)))"
            )
            assert {(parent, child) for parent, *children in families for child in children} == pairs
            loose = {
                int(i)
                for i in texts(tab, f"{cell} > ul > :not(.family) > a, {cell} > details > ul > :not(.family) > a")
            }
            assert loose == new - {child for _, child in pairs}
            refined += len(pairs)
    assert refined > 2

    tab.click("#tokens [data-token='2']")
    assert texts(tab, "#nested-table tr[aria-current] small") == ["2"]
    first = texts(tab, "#nested-table a")[0]
    tab.click("#nested-table a")
    tab.wait("document.querySelector('#feature article')")
    assert texts(tab, "#feature h2")[0].startswith(f"Feature {first} ")
    assert faults(tab) == []
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    scrolls = tab.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('#nested-table'))"
    )
    assert scrolls is (width == 390)
    assert complaints(tab) == []


def test_one_dictionary_has_no_others_beside_it(tab: chromium.Page, tmp_path: Path) -> None:
    config = make_config()
    flat = config.model_copy(update={"transcoder": config.transcoder.model_copy(update={"group_sizes": (10,)})})
    run: RunDirectory = make_run(tmp_path / "flat", config=flat)
    with served(run) as url:
        show(tab, url)
        assert tab.evaluate("document.querySelector('#nested').hidden") is True
        assert texts(tab, "#nested-table *") == []
        assert httpx.get(f"{url}/info").json()["model"]["prefixes"] == [10]


def test_wide_windows_are_used_and_without_scripts_the_page_says_what_works(tab: chromium.Page, url: str) -> None:
    show(tab, url, width=1920)
    edges = tab.evaluate(
        "['#tokens', '#feature'].map((s) => document.querySelector(s).getBoundingClientRect().toJSON())"
    )
    assert edges[1]["right"] - edges[0]["left"] > 1850
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(f"{url}/ui", 390, 900, "light")
        document = tab.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
        links = tab.call("DOM.querySelectorAll", nodeId=document, selector="noscript a")["nodeIds"]
        assert len(links) == 2
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
