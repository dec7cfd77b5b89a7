"""The page of attribution graphs in a real browser. Skipped without Chromium."""

# ruff: noqa: F811  (`tab` is a fixture of test_serve_ui.py)

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_local import make_layers_run, served, wait_for_interventions
from test_serve_ui import ENTER, TAB, complaints, faults, tab, texts  # noqa: F401  # tab is a fixture

from mtc.circuits import Intervention, attribute, steer
from mtc.circuits.attribution import attribute_whole
from mtc.storage import RunDirectory
from tests import chromium

PROMPT = "Hello, you!"
READY = "document.querySelector('#go')?.disabled === false"
DRAWN = (
    "!document.querySelector('#result').hidden && document.querySelector('#status').textContent === ''"
    " && document.querySelector('.graph-plot .mark')"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_layers_run(tmp_path_factory.mktemp("runs") / "deep", (2, 0, 1))


@pytest.fixture(scope="module")
def url(run: RunDirectory) -> Iterator[str]:
    with served(run, interventions=True) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_for_interventions(client)
        yield url


def draw(tab: chromium.Page, url: str, width: int = 1280, scheme: str = "light") -> None:
    """As somebody does who has a keyboard alone."""
    tab.open(f"{url}/ui/graph", width, 900, scheme)
    tab.wait(READY)
    tab.evaluate("document.querySelector('#prompt').focus(); document.querySelector('#prompt').select()")
    tab.type(PROMPT)
    tab.press(*ENTER, modifiers=2)
    tab.wait(DRAWN)


def choose(tab: chromium.Page, name: str) -> None:
    tab.evaluate(
        f"document.querySelector('[data-name=\"{name}\"]').dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_graph_is_asked_for_and_drawn(
    tab: chromium.Page,
    url: str,
    run: RunDirectory,
    width: int,
    scheme: str,
) -> None:
    draw(tab, url, width, scheme)
    graph = attribute(run, PROMPT)
    assert texts(tab, ".graph-prompt .token")[1:] == [*PROMPT.replace(" ", "␣")]
    first, last = graph.scores
    folded = f"with later ones folded in: {first.folded.nodes} nodes"
    assert texts(tab, ".graph-head tbody tr th") == [f"the first {first.prefix}", folded, f"the first {last.prefix}"]
    cells = texts(tab, ".graph-head tbody tr:nth-child(2) td")
    assert cells[:2] == [f"{first.folded.features}", f"{first.folded.replacement:.3g}"]
    assert faults(tab) == [] and complaints(tab) == []
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    background = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == background
    asked = [e["request"] for method, e in tab.events if method == "Network.requestWillBeSent"]
    assert all(each["url"].startswith((url, "data:,")) for each in asked)
    assert not any("Hello" in each["url"].partition("#")[0] for each in asked)  # no text in what is logged

    # A feature taken out: what the library says of the next token, and a link to the feature's page.
    folds = "[...document.querySelectorAll('[data-name^=f]')].map((e) => e.dataset.name)"
    name = tab.evaluate(folds)[0]
    choose(tab, name)
    tab.evaluate(
        "[...document.querySelectorAll('.graph-buttons button')].find((b) => b.textContent.startsWith('Take')).click()"
    )
    tab.wait("document.querySelector('.ablated tbody tr')")
    sent = [json.loads(e["request"]["postData"]) for method, e in tab.events
            if method == "Network.requestWillBeSent" and e["request"]["url"].endswith("/steer")]  # fmt: skip
    (body,) = sent
    assert body["input_ids"] == list(graph.token_ids) and all(each["value"] == 0 for each in body["interventions"])
    changes = [Intervention.model_validate(each) for each in body["interventions"]]
    first = steer(run, PROMPT, changes, max_tokens=1).next[0]
    row = tab.evaluate("[...document.querySelectorAll('.ablated tbody tr:first-child td')].map((e) => e.textContent)")
    assert float(row[2].replace("−", "-")) == pytest.approx(first.steered - first.plain, rel=1e-2, abs=2e-3)
    links = tab.evaluate("[...document.querySelectorAll('.graph-panel a')].map((a) => a.pathname + a.search)")
    features = [link for link in links if link.startswith("/ui/feature/")]
    assert all("?model=deep&layer=" in link for link in features)
    assert faults(tab) == [] and complaints(tab) == []
    assert httpx.get(url + features[0]).status_code == 200 if features else name

    # The link has all of it: another browser, with the same key, sees the same.
    link = tab.evaluate("location.pathname + location.hash")
    tab.open(url + link, width, 900, scheme)
    tab.wait(DRAWN)
    assert tab.evaluate("document.querySelector('#prompt').value") == PROMPT
    assert tab.evaluate("document.querySelector('.mark.chosen').dataset.name") == name
    for form in texts(tab, "#forms a"):
        address = tab.evaluate(
            f"[...document.querySelectorAll('#forms a')].find((a) => a.textContent === {json.dumps(form)}).href"
        )
        assert httpx.get(address).status_code == 200
    assert texts(tab, "nav a[aria-current]") == ["Graph"]


def test_progress_is_shown_and_work_is_cancelled(
    tab: chromium.Page,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on, ended = threading.Event(), list[str]()

    def whole(model: Any, prompt: Any, targets: Any, prefix: Any, most: int, tell: Any, *limits: Any) -> Any:
        def slowly(done: int, of: int) -> None:
            tell(done, of)
            while not go_on.wait(0.02):
                tell(done, of)

        try:
            return attribute_whole(model, prompt, targets, prefix, most, slowly, *limits)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr("mtc.circuits.attribution.attribute_whole", whole)
    try:
        tab.open(f"{url}/ui/graph", 390, 844, "dark")
        tab.wait(READY)
        tab.click("#go")
        tab.wait("/^Edges into \\d+ of \\d+ features/.test(document.querySelector('#status').textContent)")
        assert tab.evaluate("document.querySelector('#progress').value > 0")
        assert faults(tab) == []
        tab.evaluate("document.querySelector('#cancel').focus()")
        tab.press(*ENTER)
        tab.wait("document.querySelector('#status').textContent === 'Cancelled.'")
        assert tab.evaluate("document.activeElement.id") == "go"
        assert tab.evaluate("document.querySelector('#waiting').hidden && document.querySelector('#problem').hidden")
        for _ in range(500):
            if ended:
                break
            threading.Event().wait(0.02)
        assert ended == ["_Cancelled"]
    finally:
        go_on.set()


def test_what_is_refused_is_said_and_old_links_are(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui/graph#target=ab&prompt=Hello&size=4", 1280, 900, "light")
    tab.wait(READY)
    fields = "['prompt', 'targets', 'size'].map((id) => document.getElementById(id).value)"
    assert tab.evaluate(fields) == ["Hello", "ab", "4"]
    tab.click("#go")
    tab.wait("!document.querySelector('#problem').hidden")
    assert "targets[0] is 2 tokens: one is wanted" in texts(tab, "#problem")[0]
    assert not tab.evaluate("document.querySelector('#go').disabled")
    tab.open(f"{url}/ui/graph#prompt=Hello&job=gone", 1280, 900, "light")
    tab.wait("document.querySelector('#status').textContent.startsWith('The graph of this link is not kept')")
    assert tab.evaluate("document.querySelector('#prompt').value") == "Hello"
    tab.open(f"{url}/ui/graph#prompt=Hello&job=..%2Finfo%3Fmodel%3Dx%26", 1280, 900, "light")  # made by whom?
    tab.wait(READY)
    asked = [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"]
    assert not any("/info" in each for each in asked) and texts(tab, "#status") == [""]


def test_the_keyboard_reaches_all_of_the_form(tab: chromium.Page, url: str) -> None:
    tab.open(f"{url}/ui/graph", 1280, 900, "light")
    tab.wait(READY)
    tab.evaluate("document.querySelector('#prompt').focus()")
    seen = []
    tab.press(*TAB)
    tab.press(*ENTER)  # opens what is folded
    for _ in range(7):
        tab.press(*TAB)
        seen.append(tab.evaluate("document.activeElement.id"))
    assert seen == ["targets", "size", "most", "node-share", "edge-share", "faithful", "go"]


def test_without_the_setting_the_page_says_why(tab: chromium.Page, run: RunDirectory) -> None:
    with served(run) as url:
        tab.open(f"{url}/ui/graph", 390, 844, "dark")
        assert "takes the whole language model in memory" in " ".join(texts(tab, "main")[0].split())
        assert faults(tab) == [] and complaints(tab) == [] and texts(tab, "form#ask") == []
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
