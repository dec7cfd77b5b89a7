"""A run of several layers answers as one model, each layer as its own run does, over HTTP."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serve_local import LocalControl, key_of, make_analysed_run, make_layers_run, make_service, served

from mtc.client import Client
from mtc.config import load_preset, to_yaml
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import RunDirectory, RunError, SweepError
from mtc.transcoder import load_transcoder
from serve.contract import Options
from serve.service import Catalogue, RunEncoder, ServedRun
from serve.service.kept import Tables

LAYERS = (2, 0, 1)
"""In another order than the service's."""
TEXTS = ["Hello, world", "a", "naïve – ünïcode"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_layers_run(tmp_path_factory.mktemp("runs") / "deep", LAYERS)


@pytest.fixture(scope="module")
def client(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    flat = make_analysed_run(tmp_path_factory.mktemp("others") / "flat")
    with served(run, flat) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def offline(run: RunDirectory, layer: int, texts: list[str]) -> list[list[dict[int, float]]]:
    """Each text's features by the layer's own run and a language model cut off there, token by token."""
    own = run.members()[f"layer{layer}"]
    config, transcoder = own.config(), load_transcoder(own)
    tokenizer, model = load_tokenizer(config.model), LanguageModel(config.model)
    found = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            (pair,) = model.capture(pack_windows([np.array(ids, np.int32)], []))
            codes = transcoder.encode_sparse(pair.source)
        rows: list[dict[int, float]] = [{} for _ in ids]
        for token, feature, value in zip(codes.token, codes.feature, codes.value, strict=True):
            rows[int(token)][int(feature)] = float(value)
        found.append([{}, *rows[1:]])
    return found


def rows_of(result: dict[str, Any]) -> list[dict[int, float]]:
    return [{f["feature_index"]: f["activation_value"] for f in features} for features in result["features"]]


def test_each_layer_encodes_and_decodes_as_its_own_run(client: httpx.Client, run: RunDirectory) -> None:
    answers = {}
    for layer in (None, *LAYERS):
        body = client.post("/encode", json={"inputs": TEXTS, "layer": layer, "include": ["relative_error"]}).json()
        number = 0 if layer is None else layer  # the lowest answers where none is named
        own = run.members()[f"layer{number}"]
        assert (body["model"]["run_id"], body["model"]["layer"]) == ("deep", number)
        assert body["model"]["source"] == ("mlp_in" if number == 0 else "resid_mid")
        assert body["model"]["sha256"] == own.manifest().files["transcoder.safetensors"].sha256
        answers[layer] = body
        expected = offline(run, number, TEXTS)
        for result, rows in zip(body["results"], expected, strict=True):
            for found, wanted in zip(rows_of(result), rows, strict=True):
                assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        features = body["results"][0]["features"]
        decoded = client.post("/decode", json={"features": features, "layer": layer}).json()
        assert decoded["model"] == body["model"]
        again = client.post("/decode", json={"features": features, "model": f"deep/layer{number}"}).json()
        assert again["model"] == body["model"] | {"run_id": f"deep/layer{number}"}
        assert again["reconstruction"] == decoded["reconstruction"]
        transcoder = load_transcoder(own)
        dense = torch.zeros(len(features), transcoder.num_features)
        for token, many in enumerate(rows_of(body["results"][0])):
            for feature, value in many.items():
                dense[token, feature] = value
        plain = (dense @ transcoder.W_dec + transcoder.b_dec) / transcoder.target_scale
        assert np.allclose(decoded["reconstruction"], plain.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert answers[None]["results"] == answers[0]["results"]
    assert answers[0]["results"] != answers[1]["results"] != answers[2]["results"]
    by_name = client.post("/encode", json={"inputs": TEXTS, "model": "deep/layer2", "include": ["relative_error"]})
    assert by_name.json()["results"] == answers[2]["results"]
    assert by_name.json()["model"] == answers[2]["model"] | {"run_id": "deep/layer2"}


def test_one_forward_pass_for_all_layers_that_are_asked_for(run: RunDirectory) -> None:
    """It ends behind the highest of them, and the one language model has no layer above the run's highest."""
    encoder = RunEncoder(run)
    ran: list[int] = []
    layers: Any = encoder._model._layers
    assert len(layers) == 3
    hooks = [layer.self_attn.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, layer in enumerate(layers)]
    windows = [np.array(ids, np.int32) for ids in ([256, 72, 105], [256, 97], [256, 98, 99], [256, 100])]
    wanted = [Options(layer=1), Options(layer=None, prefix=4), Options(layer=0), Options(layer=1, relative_error=True)]
    together = encoder.encode_batch(windows, wanted)
    assert ran == [0, 1]
    for window, options, found in zip(windows, wanted, together, strict=True):
        ran.clear()
        (alone,) = encoder.encode_batch([window], [options])
        assert ran == list(range((options.layer or 0) + 1))
        assert alone.indptr.tolist() == found.indptr.tolist() and alone.indices.tolist() == found.indices.tolist()
        assert np.allclose(alone.values, found.values, rtol=1e-4)
    for hook in hooks:
        hook.remove()


def test_what_has_no_such_layer_names_those_that_there_are(client: httpx.Client) -> None:
    paths = ["/features", "/features/1", "/features/1/examples", "/features/1/surroundings", "/report"]
    paths += ["/report/files/plots/loss.png"]
    asked = [lambda p, path=path: client.get(path, params=p) for path in paths]
    asked += [lambda p: client.post("/encode", json={"inputs": "a"} | p)]
    asked += [lambda p: client.post("/tokenize", json={"inputs": "a"} | p)]
    asked += [lambda p: client.post("/decode", json={"features": [[]]} | p)]
    for ask in asked:
        for named, layer, there in (
            ({}, 3, [0, 1, 2]),
            ({"model": "flat"}, 0, [1]),
            ({"model": "deep/layer2"}, 0, [2]),
        ):
            refused = ask(named | {"layer": layer})
            assert (refused.status_code, refused.json()["error_type"]) == (422, "unknown_layer"), refused.text
            assert refused.json()["detail"] == {"layers": there, "value": layer}
            assert all(str(each) in refused.json()["error"] for each in there)
        assert ask({"model": "deep/layer3"}).status_code == 404
        for fitting in ({"layer": 2}, {"model": "flat", "layer": 1}, {"model": "deep/layer2", "layer": 2}):
            assert ask(fitting).status_code == 200, (fitting, ask(fitting).text)
        for malformed in (-1, 1 << 31, "x", 1.5):
            assert ask({"layer": malformed}).json()["error_type"] == "validation"


def test_what_is_known_of_features_is_each_layers_own(client: httpx.Client) -> None:
    first = client.get("/features", params={"limit": 3, "layer": 1}).json()
    assert (first["run_id"], first["layer"], first["total"]) == ("deep", 1, 10)
    same = {"limit": 3, "cursor": first["cursor"]}
    second = client.get("/features", params=same | {"layer": 1}).json()
    assert [row["feature"] for row in second["features"]] == [3, 4, 5]
    assert client.get("/features", params=same | {"model": "deep/layer1"}).json()["features"] == second["features"]
    assert client.get("/features", params=same | {"layer": 2}).json()["error_type"] == "unknown_cursor"
    for path in ("/features/3", "/features/3/examples", "/features/3/surroundings"):
        answer = client.get(path, params={"layer": 2}).json()
        assert (answer["run_id"], answer["layer"]) == ("deep", 2)
        assert client.get(path, params={"model": "deep/layer2"}).json() == answer | {"run_id": "deep/layer2"}
        assert client.get(path).json()["layer"] == 0


def test_reports_of_all_layers_and_of_each(client: httpx.Client, run: RunDirectory) -> None:
    for accept, kind in (("text/markdown", "md"), ("application/json", "json")):
        whole = client.get("/report", headers={"Accept": accept})
        assert whole.content == run.read(f"report/layers_report.{kind}")
        for layer in LAYERS:
            own = client.get("/report", params={"layer": layer}, headers={"Accept": accept})
            assert own.content == run.read(f"layer{layer}/report/layer{layer}_analysis_report.{kind}")
            named = client.get("/report", params={"model": f"deep/layer{layer}"}, headers={"Accept": accept})
            assert named.content == own.content
    assert client.get("/report/files/layers_overview.png").content == run.read("report/layers_overview.png")
    plot = client.get("/report/files/plots/density.png", params={"layer": 2})
    assert plot.content == run.read("layer2/report/plots/density.png")
    for outside in ("../layer0/config.yaml", "layer0/config.yaml", "layer2_analysis_report.md"):
        assert client.get(f"/report/files/{outside}").status_code == 404
    page = client.get("/report", headers={"Accept": "text/html"})
    assert "../layer" not in page.text
    for layer in LAYERS:
        assert f'href="/report?model=deep&amp;layer={layer}"' in page.text
    tag = {"If-None-Match": page.headers["etag"], "Accept": "text/html"}
    assert client.get("/report", headers=tag).status_code == 304


def test_info_runs_and_load_tell_the_layers_of_one_run(client: httpx.Client, run: RunDirectory) -> None:
    info = client.get("/info").json()
    assert (info["layers"], info["model"]["run_id"], info["model"]["layer"]) == ([0, 1, 2], "deep", 0)
    runs = {each["run_id"]: (each["layer"], each["layers"]) for each in client.get("/runs").json()["runs"]}
    assert runs == {"deep": (0, [0, 1, 2]), "flat": (1, [1])}
    loaded = client.post("/admin/load", json={"model": "deep"}).json()
    assert (loaded["layers"], loaded["model"]["run_id"]) == ([0, 1, 2], "deep")
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as fresh:
        for layer in LAYERS:
            assert fresh.post("/encode", json={"inputs": "a", "layer": layer}).status_code == 200
        assert "mtc_runs_loaded 1.0" in fresh.get("/metrics").text.splitlines()


def test_the_client_names_layers(client: httpx.Client) -> None:
    with Client(str(client.base_url)) as ours:
        for layer in LAYERS:
            encoding = ours.encode(TEXTS, layer=layer)
            assert encoding.model.layer == layer
            assert ours.decode(encoding.inputs[0], layer=layer).model.sha256 == encoding.model.sha256
            assert ours.tokenize("a", layer=layer).model.layer == layer
            assert [row["feature"] for row in ours.features(layer=layer, limit=4)] == list(range(10))
            assert ours.feature(3, layer=layer)["layer"] == ours.examples(3, layer=layer)["layer"] == layer
            assert ours.surroundings(3, layer=layer).layer == layer
            assert json.loads(ours.report("json", layer=layer))["config"]["model"]["layer"] == layer
        assert [entry["layer"] for entry in json.loads(ours.report("json"))["layers"]] == [0, 1, 2]
        streamed = dict(ours.encode_stream(TEXTS, layer=2))
        assert streamed[0].indices.tolist() == ours.encode(TEXTS, layer=2).inputs[0].indices.tolist()


def test_a_sweep_is_asked_for_by_its_transcoders_names(tmp_path: Path) -> None:
    sweep = [{"transcoder.k": 4}, {"transcoder.k": 2}]
    config = load_preset("tiny", {"sweep": sweep})
    run = RunDirectory(str(tmp_path / "swept"))
    run.write("config.yaml", to_yaml(config))
    for name, own in config.members():
        RunDirectory(run.location(name)).write("config.yaml", to_yaml(own))
        RunDirectory(run.location(name)).write("transcoder.safetensors", b"")
        RunDirectory(run.location(name), f"swept/{name}").publish(latest=False)
    run.publish()
    catalogue = Catalogue(run.url)
    for asked in (catalogue.served, lambda: catalogue.find("swept")):
        with pytest.raises(SweepError, match="holds 2 transcoders; name one of them") as refused:
            asked()
        assert refused.value.members == ["swept/k4", "swept/k2"]
    assert {entry.key.run_id: entry.layers for entry in catalogue.entries()} == {"swept/k4": [1], "swept/k2": [1]}


def test_a_run_keeps_few_layers_analyses_and_reads_none_before_it_is_asked_for(tmp_path: Path) -> None:
    run = make_layers_run(tmp_path / "deep")
    opened = ServedRun(key_of(run))
    read = list[str]()
    opened.read = lambda name, own=opened.read: (read.append(name), own(name))[1]  # type: ignore[misc, method-assign]
    opened.table = Tables(opened._open_table, 1)
    for layer, files in ((0, 3), (0, 0), (2, 3), (2, 0), (0, 3)):
        read.clear()
        assert opened.layer(layer).analysed.analysis.config.model.layer == layer
        assert len(read) == files and all(name.startswith(f"layer{layer}/") for name in read)


def test_a_damaged_layer_is_named_and_the_run_is_not_loaded(tmp_path: Path) -> None:
    run = make_layers_run(tmp_path / "deep")
    weights = Path(run.url, "layer2", "transcoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    key = key_of(run)

    async def load() -> None:
        service = make_service(LocalControl(run))
        with pytest.raises(RunError, match=r"layer2/transcoder\.safetensors is damaged"):
            await service.models.load(key)

    asyncio.run(load())
