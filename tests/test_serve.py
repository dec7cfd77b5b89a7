"""The HTTP service against an independent offline forward, through a real Serve proxy."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from mtc.config import RunConfig, load_preset, to_yaml
from mtc.language_model import LanguageModel
from mtc.model_files import load_tokenizer
from mtc.runs import RunDirectory, RunError
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
from mtc.work import pack_windows

TEXTS = ["a", "Hello, world", "<bos> is spelled out", "naïve – ünïcode", "x" * 200, "two\nlines"]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_preset("tiny", {"model": {"dtype": "float32"}})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> RunDirectory:
    run = RunDirectory(str(tmp_path_factory.mktemp("runs") / "one"))
    shape = TranscoderShape(32, 32, config.transcoder.group_sizes, config.transcoder.k, config.input_norm)
    transcoder = MatryoshkaTranscoder(shape, seed=3)
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=torch.Generator().manual_seed(4))
        transcoder.b_enc.fill_(0.1)
        transcoder.W_enc[9] = transcoder.W_enc[5]  # equal activations, to see ties broken
        transcoder.threshold.fill_(0.8)
    run.write("config.yaml", to_yaml(config))
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.write("analysis.json", json.dumps({"run_id": "one"}))
    run.write("report/layer1_analysis_report.md", "# Report\n")
    run.write("report/layer1_analysis_report.json", json.dumps({"run_id": "one"}))
    run.write("report/layer1_analysis_report.html", "<!doctype html><title>é</title>")
    run.write("report/plots/loss.png", b"\x89PNG")
    run.publish()
    return run


@pytest.fixture(scope="module")
def url(ray_cluster: object, run: RunDirectory) -> Any:
    from ray import serve

    from serve.app import AppArgs, build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    latest = str(Path(run.path).parent / "latest")
    args = AppArgs(run=latest, max_input_tokens=256, num_cpus_encoder=0.5)
    serve.run(build(args), name="mtc", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def offline(run: RunDirectory, config: RunConfig) -> Any:
    """The same answer without serve/: one text at a time, with topk."""
    tokenizer, model = load_tokenizer(config.model), LanguageModel(config.model)
    transcoder = MatryoshkaTranscoder.load(run.location("transcoder.safetensors"))

    def encode(text: str, top_k: int, prefix: int | None = None) -> list[tuple[int, dict[int, float]]]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids]
        with torch.no_grad():
            (pair,) = model.capture(pack_windows([np.array(ids, np.int32)], []))
            activations = transcoder.encode(pair.source, prefix)
        answer = []
        for position, row in enumerate(activations):
            top = row.topk(min(top_k, len(row)))
            active = {int(i): float(v) for i, v in zip(top.indices, top.values, strict=True) if v > 0}
            answer.append((ids[position], {} if position == 0 else active))
        return answer

    return encode


def check(result: dict[str, Any], expected: list[tuple[int, dict[int, float]]]) -> None:
    assert [t["token_id"] for t in result["tokens"]] == [i for i, _ in expected]
    for token, (_, features) in zip(result["tokens"], expected, strict=True):
        got = {f["feature_index"]: f["activation_value"] for f in token["features"]}
        assert got == pytest.approx(features, rel=1e-4, abs=1e-5)
        order = [(-f["activation_value"], f["feature_index"]) for f in token["features"]]
        assert order == sorted(order)


def check_error(response: httpx.Response, status: int, error_type: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "error_type", "request_id", "detail"}
    assert body["error_type"] == error_type
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def test_encode_equals_offline_forward(client: httpx.Client, offline: Any, config: RunConfig) -> None:
    response = client.post("/encode", json={"inputs": TEXTS, "top_k": 64})
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["run_id"], body["layer"], body["source"], body["target"]) == ("one", 1, "resid_mid", "mlp_out")
    assert (body["num_features"], body["k"], body["prefixes"], body["prefix"]) == (64, 8, [16, 48, 64], 64)
    for text, result in zip(TEXTS, body["results"], strict=True):
        check(result, offline(text, 64))
    bos, *rest = body["results"][1]["tokens"]
    assert bos["is_special"]
    assert bos["features"] == []
    assert "".join(t["token"] for t in rest) == TEXTS[1]
    assert not any(t["is_special"] for t in body["results"][2]["tokens"][1:])
    pairs = [[f["feature_index"] for f in t["features"]] for r in body["results"] for t in r["tokens"]]
    tied = [p for p in pairs if 5 in p]
    assert tied
    assert all(p[p.index(5) + 1] == 9 for p in tied)


def test_concurrent_requests_of_different_lengths(url: str, offline: Any) -> None:
    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/encode", json={"inputs": t, "top_k": 64}) for t in TEXTS * 3))

    for text, response in zip(TEXTS * 3, asyncio.run(all_at_once()), strict=True):
        check(response.json()["results"][0], offline(text, 64))


def test_top_k_and_prefix(client: httpx.Client, offline: Any) -> None:
    full = client.post("/encode", json={"inputs": "Hello", "top_k": 64}).json()["results"][0]["tokens"]
    few = client.post("/encode", json={"inputs": "Hello", "top_k": 2}).json()["results"][0]["tokens"]
    assert [t["features"] for t in few] == [t["features"][:2] for t in full]
    body = client.post("/encode", json={"inputs": "Hello", "top_k": 64, "prefix": 16}).json()
    assert body["prefix"] == 16
    check(body["results"][0], offline("Hello", 64, 16))
    assert all(f["feature_index"] < 16 for t in body["results"][0]["tokens"] for f in t["features"])


@pytest.mark.parametrize(
    ("body", "status", "error_type"),
    [
        ({"inputs": []}, 400, "empty_inputs"),
        ({"inputs": ["a", ""]}, 400, "empty_inputs"),
        ({"inputs": ["a"] * 65}, 413, "too_many_inputs"),
        ({"inputs": "x" * 256}, 413, "text_too_long"),
        ({"inputs": "x" * (1 << 20)}, 413, "too_large"),
        ({"inputs": "a", "top_k": 0}, 422, "validation"),
        ({"inputs": "a", "top_k": 65}, 422, "validation"),
        ({"inputs": "a", "prefix": 17}, 422, "validation"),
        ({"inputs": "a", "topk": 5}, 422, "validation"),
        ({"inputs": 5}, 422, "validation"),
        ({}, 422, "validation"),
    ],
)
def test_refused_requests(client: httpx.Client, body: dict[str, Any], status: int, error_type: str) -> None:
    error = check_error(client.post("/encode", json=body), status, error_type)
    if error_type == "text_too_long":
        assert error["detail"] == {"limit": 256, "value": 257, "index": 0}
        assert "256" in error["error"]


def test_other_errors_have_the_same_shape(client: httpx.Client) -> None:
    check_error(client.get("/nothing"), 404, "not_found")
    check_error(client.get("/encode"), 405, "method_not_allowed")
    check_error(client.post("/encode", content=b"{"), 422, "validation")
    check_error(client.get("/report", headers={"accept": "image/png"}), 406, "not_acceptable")


def test_report(client: httpx.Client) -> None:
    for accept in ("*/*", "text/markdown", "text/*", "text/html;q=0.1, */*;q=0.8"):
        response = client.get("/report", headers={"accept": accept})
        assert response.text == "# Report\n"
        assert response.headers["content-type"].startswith("text/markdown")
    for accept in ("text/html", "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"):
        response = client.get("/report", headers={"accept": accept})
        assert response.content == "<!doctype html><title>é</title>".encode()
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert response.headers["vary"] == "Accept"
    for accept in ("application/json", "text/markdown;q=0.5, application/json"):
        response = client.get("/report", headers={"accept": accept})
        assert response.json() == {"run_id": "one"}
        assert response.headers["content-type"] == "application/json"


def test_report_files(client: httpx.Client) -> None:
    response = client.get("/report/files/plots/loss.png")
    assert response.content == b"\x89PNG"
    assert response.headers["content-type"] == "image/png"
    for name in ("..%2fconfig.yaml", "%2fetc%2fpasswd", "plots/..%2f..%2fconfig.yaml", "plots", "nothing.png"):
        check_error(client.get(f"/report/files/{name}"), 404, "not_found")


def test_probes_and_info(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}
    info = client.get("/info").json()
    assert info["run_id"] == "one"
    assert info["transcoder"]["prefixes"] == [16, 48, 64]
    assert set(info["versions"]) == {"python", "mtc", "ray", "torch", "transformers"}


def test_killed_replica_is_replaced(client: httpx.Client, offline: Any) -> None:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    actors = [a for a in named if a["name"].startswith("SERVE_REPLICA::mtc#Encoder#")]
    for actor in actors:
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    assert actors
    response = client.post("/encode", json={"inputs": "after", "top_k": 64})
    check(response.json()["results"][0], offline("after", 64))


def test_run_that_can_not_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serve.app import AppArgs, build, main

    RunDirectory(str(tmp_path / "half")).write("config.yaml", "")
    with pytest.raises(RunError, match="not finished"):
        build(AppArgs(run=str(tmp_path / "half")))
    assert main(["--run", str(tmp_path / "latest")]) == 2
    assert "no finished run" in capsys.readouterr().err
