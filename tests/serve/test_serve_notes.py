"""Notes and stars: over HTTP, through the client, and in a real browser."""

# ruff: noqa: F811  (`tab` is a fixture of test_serve_ui.py)

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serve_local import make_analysed_run, make_layers_run, served
from test_serve_ui import ENTER, complaints, faults, tab, texts  # noqa: F401  # tab is a fixture

from mtc.client import AsyncClient, Client, ServiceError
from mtc.storage import Notes, RunDirectory, open_run, read_notes
from serve.http import keys
from serve.service.notes import LayerNotes
from tests import chromium

WORDS = "<img src=x onerror=alert(1)> \u202eoaths"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return make_analysed_run(tmp_path / "one")


def put(client: httpx.Client, feature: int = 3, /, **body: Any) -> httpx.Response:
    return client.put(f"/features/{feature}/note", json=body)


def test_notes_are_kept_listed_and_found(run: RunDirectory, tmp_path: Path) -> None:
    deep = make_layers_run(tmp_path / "deep")
    with (
        served(run, deep, notes=True) as url,
        served(run, notes=True) as other,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.get("/info").json()["notes"] is True
        first = put(client, note=f"  {WORDS} ", star=True).json()
        assert (first["note"], first["star"], first["feature"], first["layer"]) == (WORDS, True, 3, 1)
        for base in (url, other):  # another replica reads the same storage
            found = httpx.get(f"{base}/features/3", timeout=60).json()
            assert [found[name] for name in ("note", "star", "note_changed")] == [WORDS, True, first["note_changed"]]
        assert put(client, 5, star=True).json()["note"] is None
        rows = {row["feature"]: (row["note"], row["star"]) for row in client.get("/features").json()["features"]}
        assert rows == {i: (None, False) for i in range(10)} | {3: (WORDS, True), 5: (None, True)}

        def listed(**query: Any) -> list[int]:
            return [row["feature"] for row in client.get("/features", params=query).json()["features"]]

        assert listed(starred=True) == [3, 5] and listed(starred=True, note="OATHS") == [3]
        assert listed(starred=False) == [0, 1, 2, 4, 6, 7, 8, 9] and listed(note="nothing") == []
        assert put(client, star=False).json()["note"] == WORDS and listed(starred=True) == [5]
        late = put(client, note="mine", seen=first["note_changed"])
        assert (late.status_code, late.json()["error_type"]) == (412, "note_changed")
        assert late.json()["detail"]["note"] == WORDS
        now = put(client, note="mine", seen=late.json()["detail"]["note_changed"]).json()
        assert now["note"] == "mine" and put(client, 6, note="new", seen=None).status_code == 200
        assert put(client, 6, note=None).json()["note"] is None and put(client, note=" ").json()["note"] is None
        assert open_run(run.url).run_id == "one"  # every file is still the manifest's
        for layer in (0, 2):
            place = {"model": "deep", "layer": layer}
            client.put("/features/1/note", params=place, json={"note": f"of {layer}"})
        assert [read_notes(RunDirectory(f"{deep.url}/layer{n}"))[1].note for n in (0, 2)] == ["of 0", "of 2"]
        assert client.get("/features/1", params={"model": "deep", "layer": 2}).json()["note"] == "of 2"
        assert client.get("/features/1").json()["note"] is None


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"note": "x" * 501}, "note: at most 500 characters are wanted"),
        ({"note": 1}, "note: text is wanted"),
        ({"star": "yes"}, "star: true or false is wanted"),
        ({"star": None}, "star: true or false is wanted"),
        ({}, "give `note`, `star` or both"),
        ({"seen": "2020"}, "give `note`, `star` or both"),
        ({"note": "a", "feature": 4}, "feature: "),
    ],
)
def test_what_is_no_note_is_refused(run: RunDirectory, body: dict[str, Any], told: str) -> None:
    with served(run, notes=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = put(client, **body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert told in answer.json()["error"], answer.json()["error"]
        assert read_notes(run) == {}


def test_only_where_it_is_switched_on_and_only_as_json(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        Notes(run).update(3, lambda old: old.model_copy(update={"note": "from elsewhere"}))
        assert client.get("/features/3").json()["note"] == "from elsewhere"
        answer = put(client, note="a")
        assert (answer.status_code, answer.json()["error_type"]) == (409, "no_notes")
    with served(run, notes=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"content": b'{"note": "a"}', "headers": {"Content-Type": "text/plain"}}
        assert client.put("/features/3/note", **body).status_code == 415  # type: ignore[arg-type]
        assert put(client, 10, note="a").json()["error_type"] == "unknown_feature"
        # Without a word of CORS, browsers do not send PUT for another site's page.
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "PUT"}
        preflight = client.options("/features/3/note", headers=asked)
        assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers

        def refuse(*arguments: object, **options: object) -> None:
            raise PermissionError(13, "no")

        monkeypatch.setattr(RunDirectory, "write", refuse)
        answer = put(client, note="a")
        assert (answer.status_code, answer.json()["error_type"]) == (409, "read_only")
        assert read_notes(run)[3].note == "from elsewhere"


def test_storage_that_hangs_holds_up_nothing_else(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, release, startup = threading.Event(), threading.Event(), uvicorn.Server.startup

    async def with_five_threads(*arguments: Any, **options: Any) -> None:  # as Ray Serve gives a replica
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(5))
        await startup(*arguments, **options)

    def hang(*arguments: object) -> dict[str, Any]:
        hangs.set()
        assert release.wait(timeout=120)
        return {}

    monkeypatch.setattr(uvicorn.Server, "startup", with_five_threads)
    monkeypatch.setattr("serve.service.notes.FRESH_S", 0)
    monkeypatch.setattr("serve.service.notes.WRITE_S", 0.2)
    texts = {"inputs": ["a" * 100] * 20}  # which threads tokenise
    with (
        served(run, notes=True) as url,
        httpx.Client(base_url=url, timeout=30) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        assert client.post("/encode", json=texts).status_code == 200  # the models are loaded
        assert client.get("/features").status_code == 200 and put(client, note="before").status_code == 200
        try:
            monkeypatch.setattr("mtc.storage.notes._local_files", hang)
            answers = list(pool.map(lambda _: client.get("/features").json()["features"][3]["note"], range(12)))
            assert hangs.is_set() and answers == ["before"] * 12
            assert client.get("/features/3").json()["note"] == "before"
            assert all(client.get(f"/ui/{page}").status_code == 200 for page in ("features", "feature/3"))
            assert client.post("/encode", json=texts).status_code == 200
            late = put(client, note="late")
            assert (late.status_code, late.json()["error_type"]) == (503, "storage")
            assert "has not answered for 0.2 s" in late.json()["error"]
        finally:
            release.set()


def test_notes_that_were_never_read_are_waited_for_and_then_left_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    Notes(run).update(3, lambda old: old.model_copy(update={"note": "there"}))
    release = threading.Event()
    own = LayerNotes(run)
    ask = own._notes.read
    monkeypatch.setattr(own._notes, "read", lambda: release.wait(timeout=120) and ask())

    async def readings() -> list[Any]:
        monkeypatch.setattr("serve.service.notes.FIRST_S", 0.1)
        found = [await own.read()]
        monkeypatch.setattr("serve.service.notes.FIRST_S", 1e9)  # counts from the first reading on
        found.append(await own.read())
        release.set()
        assert own._reading
        await asyncio.wrap_future(own._reading)
        return [*found, await own.read()]

    *without, found = asyncio.run(readings())
    assert without == [{}, {}] and found[3].note == "there"


def test_any_key_writes_from_this_services_pages_or_with_a_header(run: RunDirectory, tmp_path: Path) -> None:
    key = keys.add_key(tmp_path / "keys.json", "someone", admin=False, expires=None)
    with (
        served(run, notes=True, api_keys_file=str(tmp_path / "keys.json")) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert put(client, note="a").status_code == 401
        cookie = {"Cookie": f"mtc_key={key}"}
        for origin, status in (({}, 401), ({"Origin": "http://evil.example"}, 401), ({"Origin": url}, 200)):
            answer = client.put("/features/3/note", json={"note": "a"}, headers=cookie | origin)
            assert answer.status_code == status
        with Client(url, api_key=key) as own:
            assert own.note(3, "b", star=True)["note"] == "b" and own.note(3, star=False)["note"] == "b"
            seen = own.feature(3)["note_changed"]
            assert own.note(3, "", seen=seen)["note"] is None
            with pytest.raises(ServiceError) as refused:
                own.note(3, "c", seen=seen)
            assert (refused.value.status, refused.value.error_type) == (412, "note_changed")

        async def ask() -> Any:
            async with AsyncClient(url, api_key=key) as own:
                return await own.note(4, "d", star=True)

        assert asyncio.run(ask())["star"] is True


@pytest.fixture
def base(run: RunDirectory) -> Iterator[str]:
    with served(run, notes=True) as url:
        yield url


def opened(tab: chromium.Page, url: str, width: int = 1280, scheme: str = "light") -> None:
    tab.open(url, width, 900, scheme)
    tab.wait("!document.querySelector('#note').hidden")


def write(tab: chromium.Page, words: str) -> None:
    tab.evaluate("document.querySelector('#note-text').focus(); document.querySelector('#note-text').select()")
    tab.type(words)
    tab.press(*ENTER)


def told(tab: chromium.Page, words: str) -> None:
    tab.wait(f"document.querySelector('#note-told').textContent.includes({json.dumps(words)})")


def starred_meanwhile(tab: chromium.Page, base: str, run: RunDirectory) -> None:
    """A star does not make the page believe that the note which somebody else wrote meanwhile was seen."""
    field = "document.querySelector('#note-text').value"
    Notes(run).update(3, lambda old: old.model_copy(update={"note": "second"}))
    tab.click("#star")
    told(tab, "changed the note to “second”")
    assert tab.evaluate(field) == "second"  # nothing was written in it
    tab.evaluate("document.querySelector('#note-text').value = 'begun'")
    Notes(run).update(3, lambda old: old.model_copy(update={"note": "third"}))
    for _ in range(2):
        tab.evaluate("document.querySelector('#note-told').textContent = ''")
        tab.click("#star")
        told(tab, "changed the note to “third”")
    assert tab.evaluate(field) == "begun"
    tab.click("#note button:not(#star)")
    told(tab, "Save again to replace that")
    assert read_notes(run)[3].note == "third" and tab.evaluate(field) == "begun"
    tab.click("#note button:not(#star)")
    told(tab, "Kept beside the run")
    assert read_notes(run)[3].note == "begun"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_page_keeps_notes_beside_the_run(
    tab: chromium.Page,
    base: str,
    run: RunDirectory,
    width: int,
    scheme: str,
) -> None:
    opened(tab, f"{base}/ui/feature/3", width, scheme)
    tab.evaluate("document.querySelector('#star').focus()")
    tab.press(*ENTER)
    told(tab, "Kept beside the run")
    assert tab.evaluate("document.querySelector('#star').ariaPressed") == "true"
    write(tab, WORDS)
    tab.wait("document.querySelector('#noted .note')")
    assert read_notes(run)[3].model_dump(exclude={"changed"}) == {"note": WORDS, "star": True}
    assert faults(tab) == [] and complaints(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = texts(tab, "#noted")
    for page in ("/ui/feature/3", "/ui/features?starred=true"):
        tab.open(base + page, width, 900, scheme)
        shown = texts(tab, "#noted, tr[data-feature='3'] .noted")
        assert [each.split() for each in shown] == [each.split() for each in drawn] and "U+202E" in shown[0]
        assert tab.evaluate("document.querySelectorAll('main img').length") == 0
        assert faults(tab) == [] and complaints(tab) == []
    assert texts(tab, "tr[data-feature] th") == ["3"]
    opened(tab, f"{base}/ui/feature/3")
    Notes(run).update(3, lambda old: old.model_copy(update={"note": "by another"}))
    write(tab, "mine")
    told(tab, "changed it to “by another”")
    assert read_notes(run)[3].note == "by another"
    tab.press(*ENTER)
    told(tab, "Kept beside the run")
    assert read_notes(run)[3].note == "mine"
    starred_meanwhile(tab, base, run)
    httpx.put(f"{base}/features/1/note", json={"note": "its parent"}, timeout=60)
    child = httpx.get(f"{base}/ui/feature/7", timeout=60).text
    assert '1</a> <span class="label">its parent</span>' in child  # 1 goes by that where another page names it


def test_without_the_service_notes_stay_in_the_browser(
    tab: chromium.Page,
    run: RunDirectory,
    tmp_path: Path,
) -> None:
    Notes(run).update(5, lambda old: old.model_copy(update={"note": "of the run"}))
    with served(run) as url:
        opened(tab, f"{url}/ui/feature/3")
        assert "Stays in this browser" in texts(tab, "#note-told")[0]
        write(tab, WORDS)
        told(tab, "Kept in this browser only")
        tab.click("#star")
        opened(tab, f"{url}/ui/feature/3")
        assert tab.evaluate("document.querySelector('#note-text').value") == WORDS
        assert tab.evaluate("document.querySelector('#star').ariaPressed") == "true"
        assert list(read_notes(run)) == [5]
        for width in (390, 1280):
            tab.open(f"{url}/ui/features", width, 900, "dark")
            tab.wait("!document.querySelector('#own-notes').hidden")
            assert "oaths" in texts(tab, "tr[data-feature='3'] .note")[0]
            assert texts(tab, "tr[data-feature='5'] .note") == ["of the run"]
            assert texts(tab, "#own-notes a") == ["Starred (1)", "All noted (1)", "Download notes.json"]
            assert faults(tab) == [] and complaints(tab) == []
        tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "downloads"))
        tab.click("#own-notes a[download]")
        tab.wait("document.querySelector('#own-notes a[download]')")
        file, deadline = tmp_path / "downloads" / "notes.json", time.monotonic() + 60
        while not file.exists() or not file.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        tab.click("#own-notes a")
        tab.wait("document.querySelectorAll('tr[data-feature]').length === 1")
    shutil.copy(file, run.url)
    assert read_notes(run)[3].note == WORDS and read_notes(run)[3].star
    with served(run, notes=True) as url:
        assert httpx.get(f"{url}/features/3", timeout=60).json()["note"] == WORDS
