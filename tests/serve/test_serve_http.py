"""HTTP as clients speak it: HEAD, HTTP/1.0, clients that leave, other origins, names of this machine, connections that
are no requests; each over real connections."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hostile import Attack, send
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from serve_local import make_analysed_run, served

from mtc.storage import RunDirectory
from serve.contract import Encoded, Options, RunKey, Settings
from serve.http import ROUTES, keys
from serve.service import Models

BODY = {"inputs": "Hello"}
ORIGIN = "https://app.example.org"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def client(run: RunDirectory) -> Iterator[httpx.Client]:
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def answers(client: httpx.Client, route: str, method: str, code: str) -> float:
    """How many the service has counted."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    wanted = {"route": route, "method": method, "code": code}
    samples = (s for family in families for s in family.samples if s.name == "mtc_http_requests_total")
    return sum(sample.value for sample in samples if sample.labels == wanted)


def wait_until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def talk(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60)


@pytest.mark.parametrize("path", sorted(path for method, path in ROUTES if method == "GET"))
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    address = path.replace("{feature}", "3").replace("{name:path}", "text.js" if "static" in path else "plots/loss.png")
    get, head = client.get(address), client.head(address)  # httpx fails if a body follows on the kept connection
    wanted = (409,) if path.startswith("/graph/") else (200, 303)  # which this service has not
    assert head.status_code == get.status_code in wanted
    assert head.content == b""
    same = {"content-type", "etag", "cache-control", "content-security-policy", "location", "content-length"}
    same -= {"content-length"} if path == "/metrics" else set()
    assert {k: v for k, v in head.headers.items() if k in same} == {k: v for k, v in get.headers.items() if k in same}
    assert client.get("/healthz").json() == {"status": "ok"}


def test_head_elsewhere(client: httpx.Client) -> None:
    before = answers(client, "/healthz", "HEAD", "200")
    assert client.head("/healthz").status_code == 200
    assert answers(client, "/healthz", "HEAD", "200") == before + 1
    assert client.head("/nothing").status_code == 404
    refused = client.head("/encode")
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert client.put("/healthz").headers["allow"] == "GET, HEAD"


def test_http_1_0_gets_ndjson_without_chunks(client: httpx.Client) -> None:
    body = json.dumps({"inputs": ["a", "b"]}).encode()
    accept = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
    fields = accept | {"Host": "127.0.0.1", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    answer = send(str(client.base_url), Attack("", f"POST /encode HTTP/1.0\r\n{head}\r\n".encode() + body, ()))
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(answer.body)))
    assert "transfer-encoding" not in answer.headers
    assert [json.loads(line)["type"] for line in answer.body.splitlines()] == ["model", "result", "result", "usage"]
    newer = client.post("/encode", content=body, headers=accept)
    assert newer.headers["transfer-encoding"] == "chunked"


class OneAnswer(Models):
    """Answers the first time, and then never."""

    answered = False

    async def encode_windows(self, key: RunKey, windows: Any, options: Options) -> list[Encoded]:
        if self.answered:
            await asyncio.Event().wait()
        self.answered = True
        return await super().encode_windows(key, windows, options)


def test_streams_that_the_client_cuts_are_499(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), served(run, models=OneAnswer, max_batch_tokens=4) as url, talk(url) as client:
        accept = {"Accept": "application/x-ndjson"}
        with client.stream("POST", "/encode", json={"inputs": ["abc"] * 3}, headers=accept) as answer:
            assert answer.status_code == 200
            assert json.loads(next(answer.iter_lines()))["type"] == "model"
        wait_until(lambda: answers(client, "/encode", "POST", "499"))
        assert answers(client, "/encode", "POST", "200") == 0
    assert '"route":"/encode","method":"POST","code":499' in caplog.text


def test_what_is_no_request_is_counted_and_logged(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    before = answers(client, "none", "any", "400")
    with caplog.at_level("INFO"):
        answer = send(str(client.base_url), Attack("", b"get /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", ()))
    assert json.loads(answer.body)["request_id"] == answer.headers["x-request-id"]
    assert answers(client, "none", "any", "400") == before + 1
    assert answer.headers["x-request-id"] in caplog.text


def test_names_of_this_machine(client: httpx.Client) -> None:
    for host in ("localhost.", "LOCALHOST.:8000", "localhost:8000"):
        assert client.get("/info", headers={"Host": host}).status_code == 200, host
    for host in ("localhost..", "localhost.evil.example", ".localhost", "evil.localhost"):
        assert client.get("/info", headers={"Host": host}).status_code == 403, host


def preflight(origin: str, **more: str) -> dict[str, str]:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return {"Origin": origin} | asked | {name.replace("_", "-"): value for name, value in more.items()}


def test_listed_origins_may_ask_with_a_key(run: RunDirectory, tmp_path: Path) -> None:
    key = keys.add_key(tmp_path / "keys.json", "page", admin=False, expires=None)
    with served(run, api_keys_file=str(tmp_path / "keys.json"), cors_origins=[ORIGIN]) as url, talk(url) as client:
        allowed = client.options("/encode", headers=preflight(ORIGIN))  # browsers send it without the key
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in allowed.headers
        with_key = {"Origin": ORIGIN, "Authorization": f"Bearer {key}"}
        for answer in (
            client.post("/encode", json=BODY, headers=with_key),
            client.post("/encode", json={}, headers=with_key),
            client.post("/encode", json=BODY, headers={"Origin": ORIGIN}),  # an error that a page can read
        ):
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert answer.status_code == 401
        for refused in (
            client.options("/encode", headers=preflight("https://evil.example")),
            client.options("/encode", headers=preflight("null")),
            client.options("/encode", headers=preflight(ORIGIN, Access_Control_Request_Method="PATCH")),
            client.options("/encode", headers=preflight(ORIGIN, Access_Control_Request_Headers="cookie")),
        ):
            assert (refused.status_code, refused.json()["error_type"]) == (400, "cors")
        other = client.post("/encode", json=BODY, headers=with_key | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_listed_page_can_read_that_the_service_failed(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("nobody expected it")

    monkeypatch.setattr(Models, "encode_windows", fail)
    with served(run, cors_origins=[ORIGIN]) as url, talk(url) as client:
        answer = client.post("/encode", json=BODY, headers={"Origin": ORIGIN, "X-Request-ID": "mine"})
        refused = client.options("/encode", headers=preflight("https://evil.example") | {"X-Request-ID": "mine"})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    for each in (answer, refused):
        assert each.headers["x-request-id"] == each.json()["request_id"] == "mine"
        assert each.headers["x-content-type-options"] == "nosniff"


def test_no_other_origin_by_default(client: httpx.Client) -> None:
    assert client.options("/encode", headers=preflight(ORIGIN)).status_code == 405
    answer = client.get("/info", headers={"Origin": ORIGIN})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    never_sent = ("https://a.example:443", "http://a.example:80", "http://[::1]:80", "http://a.example:081")
    for wrong in (
        "*",
        "https://a.example/",
        "a.example",
        "https://A.example",
        "null",
        "https://*.a.example",
        *never_sent,
    ):
        with pytest.raises(ValidationError, match="cors_origins has"):
            Settings(run="one", cors_origins=(wrong,))
    typed = Settings.model_validate({"run": "one", "cors_origins": "https://a.example:80, http://b.example:8080"})
    assert typed.cors_origins == ("https://a.example:80", "http://b.example:8080")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inputs": [[1, 2]]}, {"inputs.0": "text is wanted"}),
        ({"inputs": 5}, {"inputs": "text is wanted, or a list is wanted"}),
        ({"input_ids": [[1, "a"]]}, {"input_ids.0.1": "a whole number is wanted"}),
        ({"inputs": "a", "top_k": 0, "k": 1}, {"top_k": "at least 1 is wanted", "k": "there is no such field"}),
        ({"inputs": "a", "return": "s"}, {"return": "'topk' or 'csr' is wanted"}),
        ({}, {"": "give either `inputs` or `input_ids`"}),
    ],
)  # fmt: skip
def test_what_is_wanted_of_a_field_is_said_once_and_in_our_words(
    client: httpx.Client, asked: dict[str, Any], said: dict[str, str]
) -> None:
    answer = client.post("/encode", json=asked)
    assert answer.status_code == 422
    assert {fault["field"]: fault["message"] for fault in answer.json()["detail"]} == said
    assert answer.json()["error"] == "; ".join(f"{f}: {m}" if f else m for f, m in said.items())
