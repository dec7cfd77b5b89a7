"""The client against the real service, and its retries against answers that are scripted, with a clock of their own."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from serve_local import make_analysed_run, make_run, served

from mtc.circuits import Intervention, attribute, steer
from mtc.client import AsyncClient, Client, EncodedInput, Retry, ServiceError
from mtc.storage import RunDirectory

TEXTS = ["Hello, world", "a", "naïve – ünïcode", "x" * 200]
OPTIONS: dict[str, Any] = {"include": ["l0", "relative_error"], "prefix": 48}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    runs = (make_run(root / "one"), make_run(root / "two", 5), make_analysed_run(root / "three"))
    with served(*runs, max_batch_tokens=64, max_inputs=8) as url:
        yield url


class Awaited:
    """An AsyncClient whose calls are awaited at once, each client in an event loop of its own."""

    def __init__(self, *arguments: Any, **options: Any):
        if "sleep" in options:
            options["sleep"] = as_coroutine(options["sleep"])
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> "Awaited":
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *reason: Any) -> None:
        self._runner.run(self._client.__aexit__(*reason))
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            answer = method(*arguments, **options)
            return self._runner.run(answer if inspect.iscoroutine(answer) else collect(answer))

        return call


async def collect(answers: Any) -> list[Any]:
    return [each async for each in answers]


def as_coroutine(function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*arguments: Any) -> Any:
        return function(*arguments)

    return call


KINDS = pytest.mark.parametrize("kind", [Client, Awaited])


@pytest.fixture(scope="module")
def plain(url: str) -> Any:
    """The service's JSON of the same request, token by token."""
    body = {"inputs": TEXTS, "top_k": 64, **OPTIONS}
    return httpx.post(f"{url}/encode", json=body, timeout=60).json()


def check(found: Any, plain: dict[str, Any]) -> None:
    assert isinstance(found, EncodedInput)
    for name in ("token_ids", "offsets", "is_special", "l0"):
        assert getattr(found, name).tolist() == plain[name]
    assert (list(found.tokens), found.truncated) == (plain["tokens"], plain["truncated"])
    kinds = (("token_ids", np.int32), ("offsets", np.int32), ("is_special", np.bool_), ("indptr", np.int64),
             ("indices", np.int32), ("values", np.float32), ("l0", np.int32),
             ("relative_error", np.float32))  # fmt: skip
    assert all(getattr(found, name).dtype == kind for name, kind in kinds)
    assert [None if np.isnan(v) else v for v in found.relative_error.tolist()] == plain["relative_error"]
    dense = np.zeros((len(plain["tokens"]), 64))
    for t, row in enumerate(plain["features"]):
        pairs = [(f["feature_index"], f["activation_value"]) for f in row]
        assert found.top(t, 64) == pairs and found.top(t, 3) == pairs[:3]
        for feature, value in pairs:
            dense[t, feature] = value
    assert found.top(-1, 64) == found.top(len(found.tokens) - 1, 64) != []
    np.testing.assert_array_equal(found.dense(64), dense)  # bit for bit


@KINDS
@pytest.mark.parametrize("format", ["safetensors", "msgpack", "json", "stream"])
def test_every_format_is_the_same_object(url: str, plain: Any, kind: Any, format: str) -> None:
    with kind(url) as client:
        if format == "stream":
            numbered = list(client.encode_stream(TEXTS, **OPTIONS))
            assert [index for index, _ in numbered] == list(range(len(TEXTS)))
            inputs = [each for _, each in numbered]
        else:
            encoding = client.encode(TEXTS, format, **OPTIONS)
            model = {**plain["model"], "prefixes": tuple(plain["model"]["prefixes"])}
            assert (encoding.model._asdict(), encoding.prefix) == (model, 48)
            assert encoding.usage._asdict() == plain["usage"]
            assert len(encoding.request_id) == 32
            inputs = encoding.inputs
        for found, expected in zip(inputs, plain["results"], strict=True):
            check(found, expected)


@KINDS
def test_ids_tokens_and_reconstructions(url: str, kind: Any) -> None:
    with kind(url) as client:
        tokenised = client.tokenize(TEXTS)
        (encoded, *_) = client.encode(TEXTS).inputs
        for found, each in zip(tokenised.inputs, client.encode(TEXTS).inputs, strict=True):
            assert found.tokens == each.tokens and found.token_ids.tolist() == each.token_ids.tolist()
            assert found.offsets.tolist() == each.offsets.tolist()
        windows = [encoded.token_ids, encoded.token_ids[:4].tolist()]
        by_ids = client.encode(input_ids=windows, top_k=3, features=range(40)).inputs
        assert [each.offsets for each in by_ids] == [None, None]
        assert [each.l0 is None and each.relative_error is None for each in by_ids] == [True, True]
        # Only what was asked for: of the first 40 features the three strongest.
        for t in range(len(encoded.tokens)):
            assert by_ids[0].top(t) == [pair for pair in encoded.top(t, 64) if pair[0] < 40][:3]
        (cut,) = client.encode("x" * 2000, truncate=True).inputs
        assert cut.truncated and len(cut.tokens) == 1024
        decoded = [client.decode(encoded, format=format) for format in ("safetensors", "msgpack", "json")]
        assert decoded[0].reconstruction.shape == (len(encoded.tokens), decoded[0].model.d_target)
        assert decoded[0].reconstruction.dtype == np.float32 and decoded[0].reconstruction.any()
        for each in decoded[1:]:
            np.testing.assert_array_equal(each.reconstruction, decoded[0].reconstruction)
        body = {"csr": {n: getattr(encoded, n).tolist() for n in ("indptr", "indices", "values")}, "prefix": 16}
        plain = httpx.post(f"{url}/decode", json=body, timeout=60).json()["reconstruction"]
        np.testing.assert_array_equal(client.decode(encoded, prefix=16).reconstruction, np.array(plain))


@KINDS
def test_features_report_runs(url: str, kind: Any) -> None:
    with kind(url) as client:
        assert client.health() and client.ready()
        assert [row["feature"] for row in client.features(model="three", limit=3)] == list(range(10))
        filtered = client.features(model="three", limit=1, sort="density", order="descending", min_density=0.1)
        assert [row["feature"] for row in filtered] == [0, 8, 7]
        assert client.feature(3, model="three")["feature"]["top_tokens"][0] == {"token_id": 0, "token": "|", "count": 5}
        assert client.examples(3, model="three")["total"] == 9
        examples = client.examples(3, model="three", kind="top", limit=1, offset=1)["examples"]
        assert [row["rank"] for row in examples] == [1]
        near = client.surroundings(1, model="three")
        assert (near.run_id, near.feature, near.contexts, near.tokens) == ("three", 1, 6, 18)
        plain = client.feature(1, model="three")["feature"]
        own = {token["token_id"] for token in plain["top_tokens"][:3]}
        relatives = {*plain["children"], *(n["feature"] for n in plain["neighbours"])}
        assert near.near_misses and all(miss.relative in {None, *relatives} for miss in near.near_misses)
        assert any(miss.relative is None for miss in near.near_misses) == bool(own & {0, 1, 2, 3, 4, 5})
        assert client.report() == "# Report\n"
        assert json.loads(client.report("json")) == {"run_id": "one"}
        assert client.report("html") == "<!doctype html><title>é</title>"
        assert [run["run_id"] for run in client.runs()] == ["one", "two", "three"]
        assert client.encode("a", model="two").model.run_id == "two"
        assert client.load("two")["model"]["run_id"] == "two"
        assert client.load("one")["previous"] == "two"
        assert client.info()["model"]["run_id"] == "one"


@KINDS
def test_refusals_are_typed_and_not_repeated(url: str, kind: Any) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("asked again")

    with kind(url, sleep=sleep) as client:
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({"inputs": ""}, 400, "empty_inputs"),
            ({"inputs": "a", "model": "none"}, 404, "unknown_model"),
            ({"inputs": ["a"] * 9}, 413, "too_many_inputs"),
            ({"inputs": "a", "prefix": 17}, 422, "validation"),
        ]
        for arguments, status, error_type in cases:
            for method in (client.encode, lambda **a: list(client.encode_stream(**a))):
                with pytest.raises(ServiceError) as caught:
                    method(**arguments)
                error = caught.value
                assert (error.status, error.error_type, len(error.request_id or "")) == (status, error_type, 32)
        with pytest.raises(
            ServiceError, match="413 too_many_inputs: the request has 9 inputs, the limit is 8"
        ) as caught:
            client.encode(["a"] * 9)
        assert caught.value.detail == {"limit": 8, "value": 9}
        with pytest.raises(UnicodeEncodeError):
            client.encode("\ud800")
        with pytest.raises(ValueError, match="'xml' is none of"):
            client.encode("a", "xml")
    with kind("http://127.0.0.1:9", retries=Retry(attempts=1)) as client:
        assert (client.health(), client.ready()) == (False, False)
        with pytest.raises(ServiceError, match="no answer unreachable: ConnectError"):
            client.info()


BUSY = {"error": "busy", "error_type": "overloaded", "request_id": "r", "detail": None}
INTERNAL = BUSY | {"error_type": "internal"}
Step = httpx.Response | Exception


def refused(status: int, body: Any = BUSY, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})


class Script:
    """A transport that gives one answer after another, and a clock that only sleeping moves."""

    def __init__(self, *steps: Step):
        self.steps, self.requests, self.slept, self.now = list(steps), list[httpx.Request](), list[float](), 100.0

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def client(self, kind: Any, retries: Retry = Retry(), chance: float = 1.0, **options: Any) -> Any:  # noqa: B008
        return kind(
            "http://service", transport=httpx.MockTransport(self.handle), clock=lambda: self.now, sleep=self.sleep,
            retries=retries, chance=lambda: chance, **options,
        )  # fmt: skip


def answer() -> httpx.Response:
    return httpx.Response(200, json={"status": "fine"})


@KINDS
def test_what_may_pass_is_asked_again(kind: Any) -> None:
    request = httpx.Request("GET", "http://service")
    script = Script(
        refused(429), refused(503), refused(502, {}), refused(504), httpx.Response(500, text="<h1>proxy</h1>"),
        httpx.ConnectError("", request=request), httpx.ReadError("", request=request),
        httpx.RemoteProtocolError("", request=request), httpx.ConnectTimeout("", request=request), answer(),
    )  # fmt: skip
    with script.client(kind, api_key="secret") as client:
        assert client.info() == {"status": "fine"}
    assert script.slept == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]  # doubled up to the longest
    assert {each.headers["authorization"] for each in script.requests} == {"Bearer secret"}
    script = Script(refused(503), refused(503), answer())
    with script.client(kind, chance=0.25) as client:  # full jitter: any part of a pause
        client.load("one")
    assert script.slept == [0.025, 0.05]
    assert [each.content for each in script.requests] == [b'{"model":"one"}'] * 3


@KINDS
def test_pauses_respect_the_service_and_the_deadline(kind: Any) -> None:
    script = Script(refused(429, retry_after="3"), refused(503, retry_after="3600"), answer())
    with script.client(kind, chance=0.5) as client:
        client.info()
    assert script.slept == [3.05, 10.1]  # not earlier than told, but not in an hour
    steps = [refused(503, retry_after="7") for _ in range(10)]
    script = Script(*steps)
    with script.client(kind, Retry(deadline_s=20, attempts=9)) as client, pytest.raises(ServiceError) as caught:
        client.info()
    assert (caught.value.status, caught.value.retry_after, caught.value.error_type) == (503, 7.0, "overloaded")
    assert script.slept == [7.1, 7.2]  # a third one would end after 21.7 seconds
    script = Script(*(refused(503) for _ in range(3)))
    with script.client(kind, Retry(attempts=3)) as client, pytest.raises(ServiceError):
        client.info()
    assert len(script.requests) == 3


@KINDS
@pytest.mark.parametrize(
    ("step", "error_type"),
    [
        (lambda: refused(500, INTERNAL), "internal"),
        (lambda: refused(401), "overloaded"),
        (lambda: refused(404, {"detail": "x"}), "http_error"),
        (lambda: httpx.ReadTimeout("slow"), "timeout"),
        (lambda: httpx.Response(200, text="<html>"), "unreadable"),
    ],
)
def test_what_would_fail_again_is_asked_once(kind: Any, step: Callable[[], Step], error_type: str) -> None:
    script = Script(step())
    with script.client(kind) as client, pytest.raises(ServiceError) as caught:
        client.info()
    assert (caught.value.error_type, script.slept) == (error_type, [])


def stream(*lines: dict[str, Any], step: int = 3) -> httpx.Response:
    """Lines in parts of a few bytes, as a network may deliver them."""
    content = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    parts = [content[i : i + step] for i in range(0, len(content), step)]

    class Parts(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return iter(parts)

        async def __aiter__(self) -> Any:
            for part in parts:
                yield part

    return httpx.Response(200, stream=Parts())


MODEL = {"type": "model", "model": {}, "prefix": 1, "request_id": "r"}
RESULT = {
    "type": "result", "index": 0, "tokens": ["a\u2028b\x85c\x0bd"], "token_ids": [1], "offsets": None,
    "is_special": [False], "truncated": False, "csr": {"indptr": [0, 1], "indices": [0], "values": [0.5]},
}  # fmt: skip
USAGE = {"type": "usage", "inputs": 1, "tokens": 1}


@KINDS
def test_streams(kind: Any) -> None:
    script = Script(refused(429), stream(MODEL, RESULT, USAGE))
    with script.client(kind) as client:
        ((index, found),) = client.encode_stream("a")
    assert (index, found.tokens, found.top(0)) == (0, ("a\u2028b\x85c\x0bd",), [(0, 0.5)])
    assert script.slept == [0.1]  # before the first line there is nothing to lose
    for lines, error_type in (
        ([MODEL, RESULT], "incomplete"),
        ([MODEL, RESULT, {"type": "error"} | BUSY], "overloaded"),
        ([MODEL, {"type": "result"}], "unreadable"),
    ):
        script = Script(stream(*lines))
        with script.client(kind) as client, pytest.raises(ServiceError) as caught:
            list(client.encode_stream("a"))
        assert (caught.value.error_type, script.slept) == (error_type, [])


def test_needs_no_models_and_no_cluster() -> None:
    code = "import sys, mtc.client; print([n for n in ('torch', 'ray', 'serve', 'fastapi') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("address", ["", "nonsense", "localhost:8000", "ftp://host", "http://[::1", "http://h:99999"])
def test_an_address_that_is_none_is_told_at_once(address: str) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"base_url=.*: an address such as http://127\.0\.0\.1:8000 is wanted"):
            client(address)


CHANGE = Intervention(layer=1, feature=5, mode="scale", value=4.0)


@pytest.fixture(scope="module")
def with_circuits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunDirectory]]:
    run = make_analysed_run(tmp_path_factory.mktemp("circuits") / "one")
    with served(run, interventions=True) as url:
        yield url, run


@KINDS
def test_graphs_and_steering(with_circuits: tuple[str, RunDirectory], kind: Any) -> None:
    url, run = with_circuits
    told: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    with kind(url) as client:
        found = client.graph("Hello", targets=["a", 7], prefix=4, faithfulness=True, tell=told.append)
        steered = client.steer(
            "Hello", [CHANGE, {"layer": 1, "feature": 3, "value": 1}], max_tokens=4, tell=lines.append
        )
        with pytest.raises(ServiceError) as caught:
            client.graph("Hello", targets=["ab"])
    wanted = attribute(run, "Hello", ["a", 7], 4)
    assert [(n.kind, n.layer, n.token, n.feature) for n in found.nodes] == [
        (n.kind, n.layer, n.token, n.feature) for n in wanted.nodes
    ]
    assert found.faithfulness is not None and told[-1]["state"] == "done"
    whole = steer(run, "Hello", [CHANGE, Intervention(layer=1, feature=3, value=1)], max_tokens=4)
    assert [c.token_ids for c in (*steered.plain, *steered.steered)] == [
        c.token_ids for c in (*whole.plain, *whole.steered)
    ]
    assert [line["type"] for line in lines] == ["prompt", *["step"] * (len(lines) - 2), "steered"]
    assert (caught.value.status, caught.value.error_type) == (422, "validation")


@KINDS
@pytest.mark.parametrize("ends", ["timeout", "interrupt"])
def test_a_graph_that_is_given_up_is_cancelled(kind: Any, ends: str) -> None:
    job = {"id": "x", "state": "running", "url": "/graph/x", "result_url": "/graph/x/result", "done": 1, "of": 9}
    running = httpx.Response(200, json=job)
    script = Script(httpx.Response(202, json=job), *[running] * 20, httpx.Response(204))

    def stop(_: dict[str, Any]) -> None:
        if ends == "interrupt" and len(script.requests) > 3:
            raise KeyboardInterrupt

    with script.client(kind) as client, pytest.raises(ServiceError if ends == "timeout" else KeyboardInterrupt) as got:
        client.graph("Hello", timeout=8, tell=stop)
    assert ends == "interrupt" or got.value.error_type == "timeout"
    assert (script.requests[-1].method, script.requests[-1].url.path) == ("DELETE", "/graph/x")
    assert [request.method for request in script.requests[:-1]] == ["POST", *["GET"] * (len(script.requests) - 2)]
    assert script.slept == sorted(script.slept) and sum(script.slept) <= 8


@KINDS
def test_steering_that_ends_early_is_no_answer(kind: Any) -> None:
    for lines, error_type in (
        ([{"type": "prompt"}, {"type": "step"}], "incomplete"),
        ([{"type": "prompt"}, {"type": "error"} | BUSY], "overloaded"),
        ([{"type": "prompt"}, {"type": "steered"}], "unreadable"),
        ([{"kind": "prompt"}], "unreadable"),
    ):
        script = Script(stream(*lines))
        with script.client(kind) as client, pytest.raises(ServiceError) as caught:
            client.steer("a", [CHANGE])
        assert (caught.value.error_type, script.slept) == (error_type, [])
