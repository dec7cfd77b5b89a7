"""Storage that hangs takes the threads that read it, none that /encode needs; what was read is not read twice."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from serve_local import make_analysed_run, served
from test_control import Told, start

from mtc.storage import RunDirectory
from serve.contract import ServiceError
from serve.service import storage_reads
from serve.service.kept import Files, Tables
from serve.service.storage_reads import THREADS, StorageReads

TEXT = "We the people of the United States. " * 60
"""Long enough to be tokenised in a thread."""


class Hanging(MemoryFileSystem):
    """Storage in memory that answers while `free` is set."""

    protocol = "hanging"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    free = threading.Event()
    asked: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        found: str = MemoryFileSystem._strip_protocol(path.removeprefix("hanging://"))
        return found

    def info(self, path: str, **options: Any) -> Any:
        self._wait(path)
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._wait(path)
        return super().ls(path, detail, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._wait(path)
        return super().cat_file(path, *arguments, **options)

    def _wait(self, path: str) -> None:
        self.asked.append(path)
        assert self.free.wait(300)


fsspec.register_implementation("hanging", Hanging, clobber=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDirectory]:
    """A run on storage that answers as yet; readers have threads of their own."""
    local = make_analysed_run(tmp_path / "one")
    Hanging.free.set()
    monkeypatch.setattr(storage_reads, "_READS", StorageReads())
    monkeypatch.setattr("serve.service.served_run.REPORT_FILES", Files())
    there = RunDirectory("hanging://runs/one")
    for path in Path(local.url).rglob("*"):
        if path.is_file():
            there.write(str(path.relative_to(local.url)), path.read_bytes())
    there.write("../latest", b"one")
    yield there
    Hanging.free.set()
    Hanging.store.clear()


def wait_until(done: Any) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_encode_answers_while_more_requests_hang_than_there_are_threads(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_reads, "STORAGE_S", 300.0)
    monkeypatch.setattr("serve.service.served_run.OPEN_S", 300.0)
    files = [name.removeprefix("report/") for name in run.manifest().files if name.startswith("report/plots/")]
    assert len(files) > THREADS + 1
    with served(run) as url, httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(64) as others:
        wait_until(lambda: client.post("/encode", json={"inputs": TEXT, "truncate": True}).status_code == 200)
        report = client.get("/report").raise_for_status().content
        Hanging.free.clear()
        Hanging.asked.clear()
        hanging = [others.submit(httpx.get, f"{url}/report/files/{name}", timeout=300) for name in files]
        hanging += [others.submit(httpx.get, f"{url}/features", timeout=300) for _ in range(20)]
        try:
            wait_until(lambda: len(Hanging.asked) >= THREADS)
            assert client.post("/encode", json={"inputs": TEXT, "truncate": True}).status_code == 200
            assert client.get("/readyz").status_code == 200
            assert client.get("/report").content == report, "which is in memory"
            assert not any(each.done() for each in hanging) and len(Hanging.asked) == THREADS
        finally:
            Hanging.free.set()
        assert {each.result(120).status_code for each in hanging} == {200}


def test_who_needs_storage_that_hangs_is_told_so_and_those_too_many_at_once(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_reads, "_READS", StorageReads(1, 2))
    with served(run) as url, httpx.Client(base_url=url, timeout=300) as client:
        wait_until(lambda: client.get("/report").status_code == 200)
        monkeypatch.setattr(storage_reads, "STORAGE_S", 0.05)
        monkeypatch.setattr("serve.service.served_run.OPEN_S", 0.05)
        Hanging.free.clear()
        for path, what in (("/report/files/plots/l0.png", "has not answered for 0.05 s"), ("/features", "for 0.05 s"),
                           ("/report/files/plots/l0.svg", "2 requests wait for it")):  # fmt: skip
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error_type"]) == (503, "storage")
            assert what in answer.json()["error"] and answer.headers["Retry-After"] == "5"
        Hanging.free.set()
        wait_until(lambda: client.get("/features").status_code == 200)


def test_control_answers_while_its_storage_hangs(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        control = await start("hanging://runs/one", Told())  # type: ignore[arg-type]
        listed = await control.runs("this")
        assert [each.run_id for each in listed] == ["one"]
        monkeypatch.setattr("serve.deployments.control.STORAGE_S", 0.05)
        Hanging.free.clear()
        async with asyncio.timeout(60):
            for _ in range(20):
                for asked in (control.runs("this"), control.want("this", "other"), control.load("this", "other")):
                    refused = await asked
                    assert isinstance(refused, ServiceError) and (refused.status, refused.error_type) == (
                        503,
                        "storage",
                    )
        Hanging.free.set()

    asyncio.run(scenario())


def test_what_several_ask_for_at_once_is_read_once() -> None:
    begun, go = list[int](), threading.Event()

    def open_one(number: int) -> list[int]:
        begun.append(number)
        assert go.wait(60)
        return [number]

    tables = Tables(open_one, 2)
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(tables, 1) for _ in range(8)]
        wait_until(lambda: begun)
        go.set()
        assert len({id(each.result(60)) for each in found}) == 1 and begun == [1]
    assert tables.known(1) == [1] and tables.known(2) is None
    for number in (2, 1, 3):
        tables(number)
    assert tables.known(2) is None, "which was used before 1"
    assert tables.known(1) == [1] and begun == [1, 2, 3]


def test_report_files_in_memory_have_a_limit() -> None:
    files = Files(10)
    files.put("a", b"1234")
    files.put("b", b"5678")
    assert files.get("a") == b"1234"
    files.put("c", b"9012")
    files.put("large", bytes(11))
    assert [files.get(name) for name in ("a", "b", "c", "large")] == [b"1234", None, b"9012", None]
