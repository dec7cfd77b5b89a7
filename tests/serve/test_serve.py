"""The deployed service through its real HTTP front, against an independent offline forward: two replicas, killed and
swapped under load."""

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hostile import Attack, attacks, send
from prometheus_client.parser import text_string_to_metric_families
from serve_deployed import TEXTS, load, replicas, wait_until
from serve_local import make_config, make_layers_run, make_run

from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import RunDirectory, RunError
from mtc.transcoder import MatryoshkaTranscoder

SETTINGS: dict[str, Any] = {
    "max_input_tokens": 256, "max_request_tokens": 4096, "num_replicas": 2, "num_cpus": 0.2,
    "watch_seconds": 0.2, "max_loaded_runs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def url(ray_cluster: object, root: Path) -> Iterator[str]:
    from ray import serve

    from serve.app import build
    from serve.contract import Settings

    for name, seed in (("other", 5), ("third", 6), ("one", 3)):
        make_run(root / name, seed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = Settings(run=str(root / "latest"), **SETTINGS)
    serve.run(build(settings), name="mtc", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.delete("mtc")
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def offline() -> Callable[[Path, str], list[tuple[int, dict[int, float]]]]:
    """The same answer without serve/: one text at a time, with a dense encoder."""
    tokenizer, models = load_tokenizer(make_config().model), dict[str, LanguageModel]()

    def encode(run: Path, text: str) -> list[tuple[int, dict[int, float]]]:
        config = RunDirectory(str(run)).config().model
        if (key := config.model_dump_json()) not in models:
            models[key] = LanguageModel(config)
        model = models[key]
        transcoder = MatryoshkaTranscoder.load(str(run / "transcoder.safetensors"))
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids]
        with torch.no_grad():
            (pair,) = model.capture(pack_windows([np.array(ids, np.int32)], []))
            activations = transcoder.encode(pair.source)
        rows = [{int(i): float(row[i]) for i in row.nonzero()} for row in activations]
        return list(zip(ids, [{}, *rows[1:]], strict=True))

    return encode


def check(body: dict[str, Any], expected: list[list[tuple[int, dict[int, float]]]]) -> None:
    for result, rows in zip(body["results"], expected, strict=True):
        assert result["token_ids"] == [token for token, _ in rows]
        for features, (_, wanted) in zip(result["features"], rows, strict=True):
            found = {f["feature_index"]: f["activation_value"] for f in features}
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have the labels; 0 without one."""
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    families = text_string_to_metric_families(response.text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_encode_equals_offline_forward(client: httpx.Client, offline: Any, root: Path) -> None:
    response = client.post("/encode", json={"inputs": TEXTS, "top_k": 64})
    assert response.status_code == 200, response.text
    body = response.json()
    model = body["model"]
    assert (model["run_id"], model["layer"], model["source"], model["target"]) == ("one", 1, "resid_mid", "mlp_out")
    assert (model["num_features"], model["k"], model["prefixes"], body["prefix"]) == (64, 8, [16, 48, 64], 64)
    assert model["sha256"] == RunDirectory(str(root / "one")).manifest().files["transcoder.safetensors"].sha256
    check(body, [offline(root / "one", text) for text in TEXTS])
    assert body["results"][1]["is_special"] == [True] + [False] * len(TEXTS[1])
    assert body["usage"] == {"inputs": len(TEXTS), "tokens": sum(len(r["token_ids"]) for r in body["results"])}


def test_probes_and_info(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["model"]["run_id"] == "one"
    assert info["limits"]["max_input_tokens"] == 256
    assert {"python", "mtc", "ray", "torch", "transformers"} <= set(info["versions"])
    assert client.post("/encode", json={"inputs": "x" * 256}).json()["detail"] == {
        "limit": 256,
        "value": 257,
        "index": 0,
    }


def test_every_answer_has_one_request_id(client: httpx.Client) -> None:
    """The client's own if it is a plain word, in the header as in the body; another for what is not."""
    for given, kept in (({}, None), ({"X-Request-ID": "mine-1"}, "mine-1"), ({"X-Request-ID": "<b>\tx"}, None)):
        for body, status in (({"inputs": "a"}, 200), ({}, 422)):
            answer = client.post("/encode", json=body, headers=given)
            (named,) = answer.headers.get_list("x-request-id")
            assert (answer.status_code, answer.json()["request_id"]) == (status, named)
            assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", named) and kept in (None, named)


def test_head_and_http_1_0_pass_the_proxy(client: httpx.Client, url: str) -> None:
    head, get = client.head("/info"), client.get("/info")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    body = b'{"inputs": "a"}'
    fields = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sent = f"POST /encode HTTP/1.0\r\n{fields}\r\nAccept: application/x-ndjson\r\n\r\n".encode() + body
    answer = send(url, Attack("", sent, (200,)))
    assert "transfer-encoding" not in answer.headers
    assert [json.loads(line)["type"] for line in answer.body.splitlines()] == ["model", "result", "usage"]


def test_totals_of_all_replicas_are_exact(client: httpx.Client, url: str) -> None:
    names = ("mtc_encode_requests_total", "mtc_encode_tokens_total", "mtc_encode_batch_tokens_sum")
    before = [metric(client, name) for name in names]
    codes, tokens = [], []

    def answered(number: int, response: httpx.Response) -> None:
        codes.append(response.status_code)
        tokens.append(response.json()["usage"]["tokens"])

    asyncio.run(load(url, 150, 8, answered))
    after = [metric(client, name) for name in names]
    assert codes == [200] * 150
    assert [b - a for a, b in zip(before, after, strict=True)] == [150, sum(tokens), sum(tokens)]
    assert metric(client, "mtc_encode_requests_total", code="200") >= 150
    assert metric(client, "mtc_encode_queue_tokens") == 0
    assert metric(client, "mtc_runs_loaded") == 2
    assert metric(client, "mtc_model_info", run_id="one") == 1
    assert metric(client, "mtc_http_requests_total", route="/encode", code="200") >= 150
    assert len(replicas("Server")) == 2  # more than one has worked: else the sum would prove nothing


def test_replica_killed_under_load(client: httpx.Client, url: str, offline: Any, root: Path) -> None:
    """The proxy asks another replica, whose answer is right, long bodies as short ones. What the killed one had not
    read yet breaks the connection or gets the proxy's own answer, in the shape of all errors: no more of them than
    requests at a time."""
    expected = [offline(root / "one", text) for text in TEXTS]
    victim, counted = replicas("Server")[0], metric(client, "mtc_encode_requests_total")
    answers, broken = 0, list[str]()

    def answered(number: int, response: httpx.Response) -> None:
        nonlocal answers
        if number == 60:
            os.kill(victim, signal.SIGKILL)
        if response.status_code in (502, 503) and response.json()["error_type"] == "unavailable":
            return broken.append(response.text)
        assert response.status_code == 200, response.text
        check(response.json(), [expected[number % len(TEXTS)]])
        answers += 1

    asyncio.run(load(url, 300, 8, answered, broken.append, lengths=(0, 200_000)))
    assert answers == 300 - len(broken) and len(broken) <= 8, broken
    # Its totals are kept, but those of its last second, in which it answered less than the 60.
    assert metric(client, "mtc_encode_requests_total") >= counted + answers - 60
    wait_until(lambda: len(found := replicas("Server")) >= 2 and victim not in found)
    check(client.post("/encode", json={"inputs": "Hello, world", "top_k": 64}).json(), [expected[1]])


def test_new_runs_take_over_under_load(client: httpx.Client, url: str, offline: Any, root: Path) -> None:
    """1,000 requests; meanwhile one run is published, another loaded by name, and a damaged one refused."""
    runs = {"one": root / "one", "published": root / "published", "other": root / "other", "damaged": root / "damaged"}
    make_run(root / "aside" / "published", seed=11)
    damaged = make_run(root / "aside" / "damaged", seed=12)
    weights = Path(damaged.path, "transcoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    expected: dict[str, list[Any]] = {}
    answers: list[tuple[int, dict[str, Any]]] = []
    events: dict[str, Any] = {}
    threads: list[asyncio.Task[Any]] = []

    def publish() -> None:
        (root / "aside" / "published").rename(runs["published"])
        (root / "latest").write_text("published")

    async def swap() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as admin:
            while (await admin.get("/info")).json()["model"]["run_id"] != "published":
                await asyncio.sleep(0.1)
            events["published"] = len(answers)
            (root / "aside" / "damaged").rename(runs["damaged"])
            events["refused"] = await admin.post("/admin/load", json={"model": "damaged"})
            events["loaded"] = await admin.post("/admin/load", json={"model": "other"})

    def answered(number: int, response: httpx.Response) -> None:
        assert response.status_code == 200, response.text
        answers.append((number, response.json()))
        if number == 100:
            publish()
            threads.append(asyncio.ensure_future(swap()))

    async def scenario() -> None:
        await load(url, 1000, 6, answered)
        await asyncio.gather(*threads)

    asyncio.run(scenario())
    assert len(answers) == 1000
    for name in ("one", "published", "other"):
        expected[name] = [offline(runs[name], text) for text in TEXTS]
    names = [body["model"]["run_id"] for _, body in answers]
    for number, body in answers:
        check(body, [expected[body["model"]["run_id"]][number % len(TEXTS)]])  # every value from the run it names
    assert {"one", "published"} <= set(names) <= {"one", "published", "other"}
    assert events["refused"].status_code == 409
    assert "sha256" in events["refused"].json()["error"] and "damaged" in events["refused"].json()["error"]
    assert events["loaded"].json()["previous"] == "published"
    body = client.post("/encode", json={"inputs": TEXTS, "top_k": 64}).json()
    assert body["model"]["run_id"] == "other"
    check(body, expected["other"])


def test_runs_by_name_are_loaded_when_asked_for(client: httpx.Client, offline: Any, root: Path) -> None:
    def states() -> dict[str, str]:
        return {run["run_id"]: run["state"] for run in client.get("/runs").json()["runs"]}

    before = states()
    assert before["other"] == "current"
    assert before["third"] == "not_loaded"
    assert before["damaged"] == "failed"
    request = {"inputs": "Hello, world", "top_k": 64, "model": "third"}
    first = client.post("/encode", json=request)
    assert (first.status_code, first.json()["error_type"], first.headers["retry-after"]) == (503, "loading", "1")
    response = wait_until(lambda: None if (r := client.post("/encode", json=request)).status_code == 503 else r)
    assert response is not None and response.status_code == 200
    check(response.json(), [offline(root / "third", "Hello, world")])
    assert response.json()["model"]["run_id"] == "third"
    after = states()
    assert after["third"] == "loaded"
    assert after["other"] == "current"
    assert sum(state in ("current", "loaded") for state in after.values()) == 2  # the others made room
    assert client.post("/encode", json={"inputs": "a"}).json()["model"]["run_id"] == "other"
    assert client.post("/encode", json=request | {"model": "damaged"}).status_code == 409
    for unknown in ("nothing", "../one", "latest", "one/../third", "one\0", "aside"):
        response = client.post("/encode", json=request | {"model": unknown})
        assert (response.status_code, response.json()["error_type"]) == (404, "unknown_model"), unknown


def test_a_run_of_several_layers_is_loaded_as_one(client: httpx.Client, offline: Any, root: Path) -> None:
    """Each layer answers as its own run's transcoder behind a language model that is cut off there."""
    make_layers_run(root / "deep", (2, 0))
    loaded = client.post("/admin/load", json={"model": "deep"}).json()
    assert (loaded["layers"], loaded["model"]["run_id"], loaded["model"]["layer"]) == ([0, 2], "deep", 0)
    assert {run["run_id"]: run["layers"] for run in client.get("/runs").json()["runs"]}["deep"] == [0, 2]
    assert client.get("/info").json()["layers"] == [0, 2]
    assert metric(client, "mtc_runs_loaded") == 4  # it and the one before, in each replica
    assert metric(client, "mtc_model_info", run_id="deep") == 1
    for layer in (0, 2):
        expected = [offline(root / "deep" / f"layer{layer}", text) for text in TEXTS]
        asked = [{"layer": layer}, {"layer": layer, "model": "deep"}, {"model": f"deep/layer{layer}"}]
        for body in [client.post("/encode", json={"inputs": TEXTS, "top_k": 64} | named).json() for named in asked * 3]:
            assert body["model"]["layer"] == layer
            check(body, expected)
    assert client.post("/encode", json={"inputs": "a", "layer": 1}).json()["detail"] == {"layers": [0, 2], "value": 1}
    assert metric(client, "mtc_runs_loaded") == 4  # nothing was loaded for one layer alone
    assert client.post("/admin/load", json={"model": "other"}).json()["previous"] == "deep"


def test_control_killed_under_load(client: httpx.Client, url: str, offline: Any, root: Path) -> None:
    """Nobody sees the loss of the control, and what it knew holds."""
    expected = [offline(root / "other", text) for text in TEXTS]
    (victim,) = replicas("Control")

    def answered(number: int, response: httpx.Response) -> None:
        if number == 60:
            os.kill(victim, signal.SIGKILL)
        assert response.status_code == 200, response.text
        assert response.json()["model"]["run_id"] == "other"
        check(response.json(), [expected[number % len(TEXTS)]])

    asyncio.run(load(url, 300, 8, answered))
    wait_until(lambda: bool(found := replicas("Control")) and victim not in found)
    response = wait_until(lambda: r if (r := client.get("/runs")).status_code == 200 else None)
    assert response is not None
    assert {run["run_id"]: run["state"] for run in response.json()["runs"]}["other"] == "current"
    assert client.get("/info").json()["model"]["run_id"] == "other"


def test_hostile_requests(client: httpx.Client, url: str, offline: Any, root: Path) -> None:
    """Through the proxy, which answers some of them itself; test_serve_hostile.py says more of the answers."""
    from serve.contract import ErrorResponse, Settings

    wrong, refused_by_proxy = [], {0, 400, 408, 413, 414, 431, 501}
    tried = [a for a in attacks(Settings(run="one", **SETTINGS)) if b"/features" not in a.sent]  # has no analysis
    shaped: dict[str, ErrorResponse] = {}
    for attack in tried:
        answer = send(url, attack)
        if answer.status not in {*attack.statuses, *refused_by_proxy} or b"root:" in answer.body:
            wrong.append((attack.name, answer))
        by_proxy = answer.body.startswith(b"<html><body><h1>400 Bad request")  # HAProxy's
        # Whoever closes while more of a request comes resets the connection, which may cost the answer's end.
        cut = len(answer.body) < int(answer.headers.get("content-length", 0))
        if answer.status >= 400 and not by_proxy and not cut:
            assert answer.body, (attack.name, answer)
            shaped[attack.name] = ErrorResponse.model_validate_json(answer.body)
            assert shaped[attack.name].request_id == answer.headers["x-request-id"]
    assert wrong == []
    assert len(tried) > 100
    # What the replicas' server and the proxy refuse by themselves, as far as they can be told how.
    refused = {"a long address", "a method in lower case", "a made-up method", "half closed"}
    assert {shaped[name].error_type for name in refused} == {"malformed_http"}
    body = client.post("/encode", json={"inputs": TEXTS, "top_k": 64}).json()
    check(body, [offline(root / body["model"]["run_id"], text) for text in TEXTS])


def test_clients_that_leave_cost_no_forward_pass(client: httpx.Client, url: str) -> None:
    async def leave() -> None:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"inputs": [' + b", ".join([b'"' + b"y" * 250 + b'"'] * 60) + b"]}"
        head = f"POST /encode HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        for _ in range(40):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + b"\r\n\r\n" + body)
            await writer.drain()
            writer.close()

    before = metric(client, "mtc_encode_batch_tokens_sum")
    asyncio.run(leave())
    waiting, working = "mtc_encode_queue_tokens", "mtc_http_requests_in_flight"
    wait_until(lambda: not metric(client, waiting) and metric(client, working) <= 1)
    assert metric(client, "mtc_encode_batch_tokens_sum") - before < 40 * 60 * 251
    assert client.post("/encode", json={"inputs": "a"}).status_code == 200


def test_run_that_can_not_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serve.app import build, main
    from serve.contract import Settings

    RunDirectory(str(tmp_path / "half")).write("config.yaml", "")
    with pytest.raises(RunError, match="not finished"):
        build(Settings(run=str(tmp_path / "half")))
    assert main(["--run", str(tmp_path / "latest")]) == 2
    assert "no finished run" in capsys.readouterr().err
