"""What threads share: sixteen clients get what one alone gets, from a process that an object that can't be shared would
end; models that are loaded at the same time."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi.routing import APIRoute
from prometheus_client.parser import text_string_to_metric_families
from serve_local import LocalControl, make_analysed_run, make_run, make_service
from starlette.routing import compile_path

from mtc.config import load_preset
from mtc.storage import RunDirectory
from serve.contract import Options
from serve.http import create_app
from serve.service import RunEncoder

CLIENTS = 16
SERVER = """
import sys
from serve_local import served
from mtc.storage import RunDirectory
with served(RunDirectory(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""
TEXT = "We the people of the United States, naïve – ünïcode. " * 40
"""Long enough for a thread."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def server(run: RunDirectory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of its own that serves the run."""
    path = [str(Path(__file__).parent.parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{SERVER}", run.url], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    with process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.stdin.close()
            if process.poll() is None:
                process.terminate()


def addresses(run: RunDirectory) -> list[str]:
    found = [
        "/healthz",
        "/readyz",
        "/metrics",
        "/runs",
        "/info",
        "/openapi.json",
        "/docs",
        "/report",
        "/ui",
        "/ui/login",
        "/ui/graph",
        "/graph/x",
        "/graph/x/result",
    ]
    found += [f"/{prefix}?{query}" for prefix in ("features", "ui/features") for query in (
        "sort=count", "text=the", "token=the", "limit=2", "group=1")]  # fmt: skip
    for feature in range(5):
        found += [f"/features/{feature}{part}" for part in ("", "/examples", "/surroundings")]
        found += [f"/ui/feature/{feature}"]
    found += [f"/report/files/{name.removeprefix('report/')}" for name in run.manifest().files if "report/" in name]
    return [*found, "/ui/static/report.css"]


def test_sixteen_clients_get_what_one_gets(server: tuple[subprocess.Popen[str], str], run: RunDirectory) -> None:
    process, url = server
    paths = addresses(run)
    routes = [route for route in create_app(make_service(LocalControl(run))).routes if isinstance(route, APIRoute)]
    tried = {path.partition("?")[0] for path in paths}
    for route in routes:
        if "GET" in route.methods:
            assert any(compile_path(route.path)[0].match(path) for path in tried), f"{route.path} is not tried"

    async def ask(client: httpx.AsyncClient, path: str) -> tuple[str, int, bytes]:
        if path == "/tokenize":
            response = await client.post(path, json={"inputs": TEXT, "truncate": True})
        else:
            response = await client.get(path)
        if path == "/metrics":  # counts what the other clients do
            assert list(text_string_to_metric_families(response.text))
            return path, response.status_code, b""
        return path, response.status_code, response.content

    async def work(client: httpx.AsyncClient, first: int) -> list[tuple[str, int, bytes]]:
        return [await ask(client, path) for path in [*paths[first:], *paths[:first]]]

    async def scenario() -> None:
        headers = {"X-Request-ID": "the-same"}
        async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as client:
            (await client.post("/encode", json={"inputs": "a"})).raise_for_status()  # loads the models
            alone = {path: (path, status, body) for path, status, body in [await ask(client, path) for path in paths]}
            refused = {path for path, status, _ in alone.values() if status == 409}
            assert refused == {"/graph/x", "/graph/x/result"}, "there are no interventions"
            assert {status for _, status, _ in alone.values()} <= {200, 303, 409}
            every = await asyncio.gather(*(work(client, n) for n in range(CLIENTS)))
        wrong = [(path, status) for answers in every for path, status, body in answers
                 if (path, status, body) != alone[path]]  # fmt: skip
        assert wrong == []

    paths.append("/tokenize")
    try:
        asyncio.run(scenario())
    except httpx.TransportError as error:
        pytest.fail(f"{error!r}; the process ended with {process.wait(60)}")
    assert process.poll() is None


def test_models_that_are_loaded_at_once_are_loaded_one_by_one(tmp_path: Path) -> None:
    """transformers changes torch's default dtype and its initialisers for the whole process while it loads a model."""
    runs = []
    for n, architecture in enumerate(("llama", "gpt2", "gemma2", "llama")):
        config = load_preset("tiny", {"model": {"dtype": "bfloat16", "name": f"random:{architecture}"}})
        runs.append(make_run(tmp_path / str(n), config=config))
    before, start = (torch.get_default_dtype(), torch.nn.init.normal_), threading.Barrier(len(runs))

    def load(run: RunDirectory) -> RunEncoder:
        start.wait(60)
        return RunEncoder(run)

    with ThreadPoolExecutor(len(runs)) as threads:
        encoders = list(threads.map(load, runs))
    assert (torch.get_default_dtype(), torch.nn.init.normal_) == before
    assert encoders[0]._model is encoders[3]._model, "runs of the same layer share the language model"
    windows, options = (
        [np.arange(3, 40, dtype=np.int32)] * 2,
        [Options(relative_error=True), Options(prefix=16, relative_error=True)],
    )
    for encoder in encoders[:3]:  # answers while another one is loaded are the same
        wanted = encoder.encode_batch(windows, options)
        try:
            torch.set_default_dtype(torch.bfloat16)
            found = encoder.encode_batch(windows, options)
        finally:
            torch.set_default_dtype(before[0])
        for one, other in zip(found, wanted, strict=True):
            for name in ("indptr", "indices", "values", "relative_error"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
