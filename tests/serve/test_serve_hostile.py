"""Hostile requests over raw connections: each gets its documented answer, and the service lives."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hostile import NAME, Attack, attacks, send
from serve_local import make_analysed_run, served, wait_for_interventions

from serve.contract import ErrorResponse, Settings

LIMITS: dict[str, Any] = {
    "max_input_tokens": 64, "max_inputs": 8, "max_request_tokens": 256,
    "body_timeout_s": 0.5, "interventions": True, "notes": True, "max_graph_tokens": 32, "max_graph_features": 64,
}  # fmt: skip
GOOD = {"inputs": "Hello", "include": ["l0", "relative_error"]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(make_analysed_run(tmp_path_factory.mktemp("runs") / "one"), **LIMITS) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_for_interventions(client)
        yield url


@pytest.fixture(scope="module")
def good(url: str) -> Any:
    return httpx.post(f"{url}/encode", json=GOOD, timeout=60).json()["results"]


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """What the server said; the client of these tests logs addresses."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name != "httpx")


@pytest.mark.parametrize("attack", attacks(Settings(run="one", **LIMITS)), ids=lambda attack: attack.name[:50])
def test_attack(url: str, good: Any, attack: Attack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = send(url, attack)
    assert answer.status in attack.statuses, answer
    assert not answer.status or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", answer.headers["x-request-id"])  # one, and plain
    if answer.status and answer.headers.get("content-type") == "application/json":
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.status >= 400:
            error = ErrorResponse.model_validate_json(answer.body)
            assert error.request_id == answer.headers["x-request-id"]
            assert attack.error_type in (None, error.error_type)
            assert NAME not in answer.body.decode()  # what was sent is not repeated
    else:
        assert attack.error_type is None, answer
    assert NAME not in logged(caplog) and "root:" not in answer.body.decode("latin-1")
    # It lives, and answers as before.
    assert httpx.post(f"{url}/encode", json=GOOD, timeout=60).json()["results"] == good


def test_logs_have_no_text_and_one_line_each(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        mine = [{"X-Request-ID": f"mine-{n}"} for n in range(3)]
        httpx.post(f"{url}/encode", json={"inputs": NAME}, headers=mine[0], timeout=60)
        httpx.get(f"{url}/features", params={"text": NAME}, headers=mine[1])
        httpx.get(f"{url}/{NAME}", headers=mine[2])
        deadline = time.monotonic() + 60
        while "mine-2" not in logged(caplog):  # a request is logged after its answer is sent
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # Whose clients have left may be logged only now.
    every = [json.loads(line) for line in logged(caplog).splitlines() if line.startswith("{")]
    lines = [line for line in every if line["request_id"].startswith("mine-")]
    assert [(line["route"], line["code"]) for line in lines] == [("/encode", 200), ("/features", 200), ("none", 404)]
    assert [line["request_id"] for line in lines] == ["mine-0", "mine-1", "mine-2"]
    assert lines[0]["run_id"] == httpx.get(f"{url}/info").json()["model"]["run_id"]
    assert NAME not in logged(caplog)


def test_slow_bodies_are_given_up(url: str) -> None:
    """Twenty connections that send a byte now and then, while others are answered."""
    parts = urlsplit(url)
    stop = threading.Event()

    def drip(_: int) -> tuple[int, float]:
        with socket.create_connection((parts.hostname or "", parts.port or 80), 30) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                               b"Content-Length: 1000\r\n\r\n")  # fmt: skip
            start = time.monotonic()
            connection.settimeout(0.1)
            received = b""
            while not stop.is_set() and b"\r\n\r\n" not in received:
                try:
                    connection.sendall(b" ")
                    received += connection.recv(1 << 16)
                except TimeoutError:
                    continue
            return int(received.split()[1]), time.monotonic() - start

    with ThreadPoolExecutor(20) as pool:
        drips = [pool.submit(drip, i) for i in range(20)]
        try:
            assert httpx.post(f"{url}/encode", json=GOOD, timeout=60).status_code == 200
            found = [each.result(timeout=30) for each in drips]
        finally:
            stop.set()
    assert [status for status, _ in found] == [408] * 20
    assert min(seconds for _, seconds in found) > 0.4


def test_answers_are_not_pages(url: str) -> None:
    answer = httpx.post(f"{url}/encode", json={"inputs": "<img src=x onerror=alert(1)>"}, timeout=60)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    page = httpx.get(f"{url}/ui/features", params={"text": '"><script>alert(1)</script>'})
    assert "<script>alert" not in page.text
    assert "script-src 'self';" in page.headers["content-security-policy"]
    report = httpx.get(f"{url}/report", headers={"Accept": "text/html"})
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts")


def test_page_names_come_from_the_manifest(url: str, tmp_path: Path) -> None:
    run = make_analysed_run(tmp_path / "one")
    Path(run.url, "report", "secret.txt").write_text("not listed")
    with served(run, **LIMITS) as other:
        assert httpx.get(f"{other}/report/files/secret.txt").status_code == 404
        assert httpx.get(f"{other}/report/files/layer1_analysis_report.md").status_code == 200
