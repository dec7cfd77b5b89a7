"""The map of features over real HTTP and in a real browser, against the run's table. Without Chromium the latter is
skipped."""

import gzip
import html
import io
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_example import HOSTILE
from serve_local import make_analysed_run, make_layers_run, served

from mtc.report.format import visible
from mtc.storage import RunDirectory
from serve.http import map_page
from serve.service.feature_map import FeatureMap
from tests import chromium
from tests.serve.test_serve_ui import complaints, faults, texts

PLACES = {i: (0.05 + 0.1 * i, 0.95 - 0.08 * i) for i in range(10) if i not in (2, 5)}  # those two never fired
ENTER, ESCAPE, SPACE = ("Enter", 13), ("Escape", 27), (" ", 32)
READY = "document.querySelector('canvas')?.dataset.view"


def get(address: str, **options: Any) -> httpx.Response:
    return httpx.get(address, timeout=60, **options)


def put(run: RunDirectory, **columns: Any) -> RunDirectory:
    """The run with other columns of features.parquet; None takes one away."""
    table = pq.read_table(Path(run.url, "features.parquet"))
    for name, values in columns.items():
        if values is None:
            table = table.drop_columns([name])
        else:
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    run.write("features.parquet", sink.getvalue())
    run.publish(latest=False)
    return run


def spread_out(run: RunDirectory, **columns: Any) -> RunDirectory:
    x, y = ([PLACES[i][axis] if i in PLACES else None for i in range(10)] for axis in (0, 1))
    return put(run, map_x=x, map_y=y, **columns)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDirectory]:
    root = tmp_path_factory.mktemp("runs")
    old = put(make_analysed_run(root / "old"), map_x=None, map_y=None)
    return [spread_out(make_analysed_run(root / "one")), old, make_layers_run(root / "deep", (2, 0))]


@pytest.fixture(scope="module")
def url(runs: list[RunDirectory]) -> Iterator[str]:
    with served(*runs) as url:
        yield url


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.browser(path) as page:
        yield page


def show(tab: chromium.Page, url: str, width: int = 1280, scheme: str = "light") -> None:
    tab.open(f"{url}/ui/map", width, 900, scheme)
    tab.wait(READY)


def pixel(tab: chromium.Page, url: str, feature: int) -> tuple[float, float]:
    """Where a feature's point is in the window."""
    points = get(f"{url}/ui/map.json").json()
    i = points["feature"].index(feature)
    left, top, scale = map(float, tab.evaluate("document.querySelector('canvas').dataset.view").split())
    tab.evaluate("document.querySelector('canvas').scrollIntoView({block: 'center'})")
    x, y = tab.evaluate("[document.querySelector('canvas').getBoundingClientRect()].map((b) => [b.x, b.y])[0]")
    return x + (points["x"][i] - left) * scale, y + (points["y"][i] - top) * scale


def mouse(tab: chromium.Page, kind: str, at: tuple[float, float], **more: Any) -> None:
    tab.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)


def scale(tab: chromium.Page) -> float:
    return float(tab.evaluate("document.querySelector('canvas').dataset.view").split()[2])


def test_points_are_those_of_the_table(url: str, runs: list[RunDirectory]) -> None:
    rows = pq.read_table(Path(runs[0].url, "features.parquet")).to_pylist()
    answer = get(f"{url}/ui/map.json", headers={"accept-encoding": "identity"})
    found = answer.json()
    assert found["feature"] == sorted(PLACES)
    for i, feature in enumerate(found["feature"]):
        row = rows[feature]
        assert (found["x"][i], found["y"][i]) == pytest.approx([v * found["size"] for v in PLACES[feature]], abs=0.51)
        assert found["group"][i] == row["group"] and found["label"][i] == row["label"]
        assert found["parent"][i] == (row["parent"]["feature"] if row["parent"] else -1)
    again = get(f"{url}/ui/map.json", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    with httpx.stream("GET", f"{url}/ui/map.json", timeout=60, headers={"accept-encoding": "gzip"}) as packed:
        assert gzip.decompress(b"".join(packed.iter_raw())) == answer.content
    other = get(f"{url}/ui/map.json", params={"model": "deep"}, headers={"if-none-match": answer.headers["etag"]})
    assert other.status_code == 200


def test_it_is_computed_once(runs: list[RunDirectory], monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever asks first, and not for those that have it already."""
    made, whole = list[int](), FeatureMap.places
    monkeypatch.setattr(FeatureMap, "places", lambda *args: (made.append(1), whole(*args))[1])
    monkeypatch.setattr(
        map_page.gzip, "compress", lambda *args, **more: (made.append(2), zlib.compress(args[0], wbits=31))[1]
    )
    with served(*runs) as url, ThreadPoolExecutor(8) as pool:
        get(f"{url}/features/0")  # which opens the table
        answers = list(pool.map(get, [f"{url}/ui/map.json"] * 8))
        assert made == [1, 2] and len({(a.content, a.headers["etag"]) for a in answers}) == 1
        tag = answers[0].headers["etag"]
        assert tag.startswith('W/"') and answers[0].headers["content-encoding"] == "gzip"
        again = get(f"{url}/ui/map.json", headers={"if-none-match": tag})
        plain = get(f"{url}/ui/map.json", headers={"accept-encoding": "identity"})
        assert again.status_code == 304 and plain.headers["etag"] == tag.removeprefix("W/")
        assert plain.content == answers[0].content and made == [1, 2]
        pages = {re.sub(r"nonce-\S+", "", get(f"{url}/ui/map").text) for _ in range(3)}
        assert len(pages) == 1 and made == [1, 2, 1]
        assert get(f"{url}/ui/map.json", params={"model": "deep"}).headers["etag"] != tag


def test_it_reads_without_a_script(url: str) -> None:
    page = get(f"{url}/ui/map").text
    dots = re.findall(r'<path class="g(\d)" d="([^"]*)"/>', page)
    size = get(f"{url}/ui/map.json").json()["size"]
    for group, path in dots:
        drawn = sorted((int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h0", path))
        own = [PLACES[i] for i in PLACES if (i >= 4) == bool(int(group))]
        np.testing.assert_allclose(drawn, sorted((x * size, y * size) for x, y in own), atol=0.51)
    assert len(dots) == 2
    tree = page[page.index('id="outline"') :]
    # Features 6 and 7 are children of 1, feature 8 of 0: the larger family stands first.
    assert [int(f) for f in re.findall(r'href="/ui/feature/(\d+)" data-feature', tree)] == [1, 6, 7, 0, 8]
    assert re.findall(r"<summary>([^<]*)</summary>", tree) == ["2 children", "1 child"]
    assert "8 of 10 features are on the map; the others never fired" in page
    assert "5 features have neither parent nor children" in page


def test_many_families_come_page_by_page(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_page, "MOST_ROOTS", 1)
    monkeypatch.setattr(map_page, "MOST_CHILDREN", 1)
    first = get(f"{url}/ui/map", params={"model": "one"}).text
    assert "1 more of feature 1" in first and "here 1 to 1" in first and "First page" not in first
    address = html.unescape(re.search(r'href="(/ui/map[^"]*)" rel="next"', first)[1])  # type: ignore[index]
    assert address == "/ui/map?model=one&first=1"
    second = get(url + address).text
    assert re.findall(r'data-feature="(\d+)"', second) == ["0", "8"]
    assert 'rel="next"' not in second and 'href="/ui/map?model=one">First page' in second
    beyond = get(f"{url}/ui/map", params={"first": 50})
    assert beyond.status_code == 200 and 'rel="next"' not in beyond.text
    for wrong in ("-1", "x", str(1 << 31)):
        assert get(f"{url}/ui/map", params={"first": wrong}).status_code == 422


def test_a_run_without_places_says_so(url: str) -> None:
    page = get(f"{url}/ui/map", params={"model": "old"}).text
    assert "analysed before there were maps" in page and "jobs/analyze.py" in page
    assert 'map.js"' not in page and "<canvas" not in page
    assert re.findall(r'data-feature="(\d+)"', page) == ["1", "6", "7", "0", "8"]  # its tree is there
    assert get(f"{url}/ui/map.json", params={"model": "old"}).json()["feature"] == []
    assert get(f"{url}/features/3", params={"model": "old"}).json()["feature"]["map_x"] is None
    assert get(f"{url}/features/3", params={"model": "one"}).json()["feature"]["map_x"] == pytest.approx(0.35)


def test_layers_and_runs_stay_in_the_links(url: str) -> None:
    page = html.unescape(get(f"{url}/ui/map", params={"model": "deep", "layer": 2}).text)
    assert 'data-points="/ui/map.json?model=deep&layer=2"' in page
    links = re.findall(r'href="/ui/feature/\d+([^"]*)"', page)
    assert set(links) == {"?model=deep&layer=2"} and len(links) == 5
    assert '<form class="layers" method="get" action="/ui/map">' in page
    assert get(f"{url}/ui/map", params={"model": "deep", "layer": 1}).status_code == 422


def test_pointed_at_and_clicked(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    at = pixel(tab, url, 6)
    mouse(tab, "mouseMoved", at)
    tab.wait("document.querySelector('canvas').dataset.shown === '6'")
    label = get(f"{url}/features/6").json()["feature"]["label"]
    assert texts(tab, ".map-tip") == [f"6 {label}"]
    # Its family is folded: what is marked is the parent that it is folded into.
    assert tab.evaluate("document.querySelector('[data-marked] a').dataset.feature") == "1"
    tab.evaluate("document.querySelectorAll('#outline details')[0].open = true")
    mouse(tab, "mouseMoved", (at[0] + 60, at[1] + 60))
    tab.wait("document.querySelector('canvas').dataset.shown === ''")
    mouse(tab, "mouseMoved", at)
    tab.wait("document.querySelector('[data-marked] a')?.dataset.feature === '6'")
    for kind in ("mousePressed", "mouseReleased"):
        mouse(tab, kind, at, button="left", clickCount=1)
    tab.wait("location.pathname === '/ui/feature/6' && document.querySelector('article')")
    assert complaints(tab) == []


def test_wheel_drag_and_buttons(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    whole, at = scale(tab), pixel(tab, url, 4)
    mouse(tab, "mouseWheel", at, deltaX=0, deltaY=-300)
    tab.wait(f"Number(document.querySelector('canvas').dataset.view.split(' ')[2]) > {1.5 * whole}")
    assert pixel(tab, url, 4) == pytest.approx(at, abs=1)  # what is under the pointer stays there
    before = pixel(tab, url, 7)
    mouse(tab, "mousePressed", at, button="left", clickCount=1)
    for step in range(1, 5):
        mouse(tab, "mouseMoved", (at[0] - 10 * step, at[1] - 5 * step), button="left")
    mouse(tab, "mouseReleased", (at[0] - 40, at[1] - 20), button="left", clickCount=1)
    tab.wait("true")
    assert pixel(tab, url, 7) == pytest.approx((before[0] - 40, before[1] - 20), abs=1)
    assert tab.evaluate("location.pathname") == "/ui/map"  # to drag is not to click
    tab.click("#whole")
    tab.wait(f"Math.abs(Number(document.querySelector('canvas').dataset.view.split(' ')[2]) - {whole}) < 1e-9")
    tab.click("#closer")
    tab.wait(f"Number(document.querySelector('canvas').dataset.view.split(' ')[2]) > {1.4 * whole}")
    assert complaints(tab) == []


def test_keyboard_alone(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    whole = scale(tab)
    tab.evaluate("document.querySelector('canvas').focus()")
    tab.press("+", 187)
    tab.wait(f"Number(document.querySelector('canvas').dataset.view.split(' ')[2]) > {1.4 * whole}")
    view = tab.evaluate("document.querySelector('canvas').dataset.view")
    tab.press("ArrowRight", 39)
    tab.wait(f"document.querySelector('canvas').dataset.view !== '{view}'")
    moved = tab.evaluate("document.querySelector('canvas').dataset.view")
    assert float(moved.split()[0]) > float(view.split()[0])
    tab.press("0", 48)
    tab.wait(f"Math.abs(Number(document.querySelector('canvas').dataset.view.split(' ')[2]) - {whole}) < 1e-9")
    tab.press(*SPACE)  # the one in the middle
    tab.wait("document.querySelector('canvas').dataset.shown !== ''")
    middle = min(PLACES, key=lambda i: (PLACES[i][0] - 0.5) ** 2 + (PLACES[i][1] - 0.5) ** 2)
    assert tab.evaluate("document.querySelector('canvas').dataset.shown") == str(middle)
    assert texts(tab, "#map-told")[0].startswith(f"Feature {middle}, group {int(middle >= 4)}")
    tab.press(*ESCAPE)
    tab.wait("document.querySelector('canvas').dataset.shown === ''")
    tab.evaluate("document.querySelector('#sought').focus()")
    tab.type("8")
    tab.press(*ENTER)
    tab.wait("document.querySelector('canvas').dataset.shown === '8'")
    assert tab.evaluate("document.querySelectorAll('#outline details')[1].open")
    assert tab.evaluate("document.querySelector('[data-marked] a').dataset.feature") == "8"
    tab.evaluate("document.querySelector('canvas').focus()")
    tab.press(*ENTER)
    tab.wait("location.pathname === '/ui/feature/8' && document.querySelector('article')")


def test_the_outline_shows_on_the_map(tab: chromium.Page, url: str) -> None:
    show(tab, url)
    tab.evaluate("document.querySelector('#outline a').focus()")
    tab.wait("document.querySelector('canvas').dataset.shown === '1'")
    assert texts(tab, "#map-told")[0].endswith("; 2 children on the map")
    tab.evaluate("document.querySelectorAll('#outline details').forEach((each) => { each.open = true; })")
    mouse(tab, "mouseMoved", tab.evaluate(chromium._MIDDLE.replace("SELECTOR", json.dumps("a[data-feature='7']"))))
    tab.wait("document.querySelector('canvas').dataset.shown === '7'")
    tab.evaluate("document.querySelector('#sought').value = 2")
    tab.click("#find button")
    tab.wait("document.querySelector('#map-told').textContent.includes('Feature 2 is not on the map')")
    # A group that is put aside is neither drawn nor met.
    tab.click(".map-legend input[data-group='1']")
    mouse(tab, "mouseMoved", pixel(tab, url, 6))
    mouse(tab, "mouseMoved", pixel(tab, url, 3))
    tab.wait("document.querySelector('canvas').dataset.shown === '3'")
    mouse(tab, "mouseMoved", pixel(tab, url, 6))
    tab.wait("document.querySelector('canvas').dataset.shown !== '3'")
    assert tab.evaluate("document.querySelector('canvas').dataset.shown") != "6"
    assert complaints(tab) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_finger_chooses_before_it_opens(tab: chromium.Page, url: str, scheme: str) -> None:
    show(tab, url, 390, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate("document.querySelector('canvas').getBoundingClientRect().bottom") < tab.evaluate(
        "document.querySelector('#outline').getBoundingClientRect().top"
    )

    def tap(at: tuple[float, float]) -> None:
        tab.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": at[0], "y": at[1]}])
        tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    at = pixel(tab, url, 9)
    tap(at)
    tab.wait("document.querySelector('#map-told a')?.textContent === '9'")
    assert faults(tab) == []
    tap(pixel(tab, url, 9))
    tab.wait("location.pathname === '/ui/feature/9' && document.querySelector('article')")


def test_hostile_labels_are_text(tab: chromium.Page, tmp_path: Path) -> None:
    label = "'<img src=x onerror=alert(1)>' \u202e\n</script><script>alert(1)</script> & {{ 1 }}" + HOSTILE[3]
    run = spread_out(make_analysed_run(tmp_path / "one"), label=[label] * 10)
    with served(run) as url:
        show(tab, url, 390)
        assert set(texts(tab, "#outline .label")) == {visible(label)}
        tab.evaluate("document.querySelector('#sought').value = 8; document.querySelector('#find button').click()")
        tab.wait("document.querySelector('#map-told .label')")
        assert texts(tab, "#map-told .label") == [visible(label)]
        assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert complaints(tab) == []
