"""The HTML report in a real browser: desktop and phone, light and dark, on paper. Skipped without Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mtc.report import write_report
from mtc.results import report_names
from tests import chromium
from tests.report_example import make_analysis, make_history

WINDOWS = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("report")
    analysis, features = make_analysis()
    name = report_names(1).html
    (directory / name).write_bytes(write_report(analysis, features, make_history(50))[name])
    return (directory / name).as_uri()


@pytest.fixture(scope="module")
def tab() -> Iterator[chromium.Page]:
    path = chromium.find()
    if path is None:
        pytest.skip(f"none of {', '.join(chromium.NAMES)} is installed")
    with chromium.browser(path) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), WINDOWS)
def test_page_opens_quietly(tab: chromium.Page, url: str, width: int, height: int, scheme: str) -> None:
    tab.open(url, width, height, scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    # Nothing said, nothing refused by the content security policy, nothing loaded but the page.
    assert not [e for e in tab.events if e[0] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
    assert not [e for e in tab.events if e[0] == "Log.entryAdded"]
    assert [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"] == [url]
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    wide = "[...document.querySelectorAll('svg, p, li, h2, h3, h4')].filter((e) => !e.closest('.scroll') && "
    wide += f"e.getBoundingClientRect().right > {width}).length"
    assert tab.evaluate(wide) == 0
    light = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(light) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    # The plots' axes have the colour of the text.
    ink = tab.evaluate("getComputedStyle(document.querySelector('.plots text')).fill")
    assert ink == tab.evaluate("getComputedStyle(document.body).color")
    drawn = "[...document.querySelectorAll('.plots svg')].map((s) => s.getBoundingClientRect().height > 100)"
    assert tab.evaluate(drawn) == [True] * 11
    assert "alert" not in tab.evaluate("[...document.scripts].map((s) => s.textContent).join()")


def change(tab: chromium.Page, selector: str, event: str, value: str) -> None:
    """As if a reader typed or chose the value."""
    tab.evaluate(
        f"(() => {{ const field = document.querySelector('{selector}'); field.value = '{value}'; "
        f"field.dispatchEvent(new Event('{event}')); }})()"
    )


def test_conveniences(tab: chromium.Page, url: str) -> None:
    tab.open(url + "#feature-8", 1280, 900, "light")
    assert tab.evaluate("document.getElementById('feature-8').checkVisibility()")
    assert not tab.evaluate("document.getElementById('feature-7').checkVisibility()")
    follow = "addEventListener('hashchange', () => done()); document.querySelector('a[href=\"#feature-7\"]').click()"
    tab.evaluate(f"new Promise((done) => {{ {follow}; }})")
    assert tab.evaluate("document.getElementById('feature-7').checkVisibility()")

    column = "[...document.querySelectorAll('.searchable tbody tr')].filter((r) => !r.hidden)"
    column += ".map((r) => r.cells[1].textContent)"
    assert tab.evaluate(column) == ["9", "8", "7", "6", "4", "3"]
    tab.evaluate("document.querySelectorAll('.searchable th button')[5].click()")  # samples, the largest first
    assert tab.evaluate(column) == ["8", "7", "6", "3", "4", "9"]
    assert tab.evaluate("document.querySelectorAll('.searchable th')[5].ariaSort") == "descending"
    search = (
        "const i = document.querySelector('input[type=search]'); i.value = '{}'; i.dispatchEvent(new Event('input'))"
    )
    tab.evaluate("{" + search.replace("{}", "no samples") + "}")
    assert tab.evaluate(column) == ["9"]

    tab.evaluate(
        "{const s = document.getElementById('scheme'); s.value = 'dark'; s.dispatchEvent(new Event('change'))}"
    )
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    tab.evaluate("document.getElementById('unfold').click()")
    assert tab.evaluate("[...document.querySelectorAll('main details')].every((d) => d.open)")


def test_paper(tab: chromium.Page, url: str) -> None:
    tab.open(url, 1280, 900, "dark")
    tab.call("Emulation.setEmulatedMedia", media="print", features=[])
    try:
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        # Without the script too, folded parts are printed.
        assert tab.evaluate("[...document.querySelectorAll('.card .inside')].every((c) => c.offsetHeight > 100)")
        assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        pdf = tab.pdf()
    finally:
        tab.call("Emulation.setEmulatedMedia", media="", features=[])
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") >= 5
