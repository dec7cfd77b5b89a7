"""A real Prometheus for tests, from Debian's package; `found()` says whether it is there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx


def found() -> bool:
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


@contextmanager
def running(config: Path, directory: Path) -> Iterator[str]:
    """Scrapes as the file says; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _ready(base):
            assert process.poll() is None and time.monotonic() < deadline, (directory / "prometheus.log").read_text()
            time.sleep(0.1)
        yield base
    finally:
        process.terminate()
        process.wait(30)


def series(base: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    """What a diagram of an expression would show, every two seconds; raises for one that Prometheus refuses."""
    parameters = {"query": expression, "start": str(start), "end": str(end), "step": "2"}
    answer = httpx.post(f"{base}/api/v1/query_range", data=parameters, timeout=60).json()
    assert answer["status"] == "success", (expression, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def _ready(base: str) -> bool:
    try:
        return httpx.get(f"{base}/-/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
