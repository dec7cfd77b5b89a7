"""Graphs and steering over HTTP, against mtc.circuits called directly on the same run."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_local import LocalControl, LocalInterventions, make_analysed_run, make_layers_run, make_service, served

from mtc.circuits import FeatureTarget, Intervention, ReplacementModel, attribute, steer
from mtc.circuits.attribution import attribute_whole
from mtc.circuits.faithfulness import measure_faithfulness
from mtc.circuits.graph import to_graph
from mtc.export.circuit_graph import circuit_graph
from mtc.report.graph_svg import graph_svg
from mtc.results import Graph, Steered
from mtc.storage import RunDirectory
from serve.contract import GraphRequest, RunKey, ServiceError, Settings, SteerRequest
from serve.http import keys
from serve.service import Circuits
from serve.service.circuits import load_replacement

PROMPT = "Hello, you!"
CHANGES = [{"layer": 1, "feature": 5, "mode": "scale", "value": 4.0}, {"layer": 1, "feature": 3, "value": 2.5}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def model(run: RunDirectory) -> ReplacementModel:
    return ReplacementModel.load(run)


@pytest.fixture(scope="module")
def client(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    deep = make_layers_run(tmp_path_factory.mktemp("deep") / "deep")
    with served(run, deep, interventions=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def submitted(client: httpx.Client, **asked: Any) -> dict[str, Any]:
    answer = client.post("/graph", json={"prompt": PROMPT} | asked)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == job["url"] == f"/graph/{job['id']}"
    return job


def finished(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while job["state"] not in ("done", "failed"):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
        job = client.get(job["url"]).json()
    return job


def computed(client: httpx.Client, **asked: Any) -> Graph:
    job = finished(client, submitted(client, **asked))
    assert job["state"] == "done", job
    return Graph.model_validate_json(client.get(job["result_url"]).content)


def close(found: Graph, wanted: Graph) -> None:
    """The same, but for what another order of sums makes of the last digits."""
    ours, theirs = found.model_dump(exclude={"edges"}), wanted.model_dump(exclude={"edges"})
    assert ours.keys() == theirs.keys()
    assert [n.model_dump(include={"kind", "layer", "token", "feature", "token_id"}) for n in found.nodes] == [
        n.model_dump(include={"kind", "layer", "token", "feature", "token_id"}) for n in wanted.nodes
    ]
    assert [e[:2] for e in found.edges] == [e[:2] for e in wanted.edges] and len(found.edges) > 5
    assert [e[2] for e in found.edges] == pytest.approx([e[2] for e in wanted.edges], rel=1e-4, abs=1e-6)
    assert [n.influence for n in found.nodes] == pytest.approx([n.influence for n in wanted.nodes], rel=1e-4, abs=1e-7)
    for name in ("run_id", "base_model", "token_ids", "tokens", "prefix", "prefixes", "active", "read", "all_edges"):
        assert getattr(found, name) == getattr(wanted, name)


def test_a_graph_is_the_librarys(client: httpx.Client, model: ReplacementModel) -> None:
    close(computed(client), attribute(model, PROMPT))
    asked = {"prefix": 4, "max_features": 12, "node_share": 1.0, "edge_share": 0.9}
    close(computed(client, targets=["a", 7], **asked), attribute(model, PROMPT, ["a", 7], **asked))
    ids = model.window(PROMPT).input_ids.tolist()
    active = next(n for n in attribute(model, PROMPT, node_share=1.0).nodes if n.kind == "feature")
    target = {"layer": active.layer, "token": active.token, "feature": active.feature}
    answer = client.post("/graph", json={"input_ids": ids, "targets": ["a", target]})
    found = Graph.model_validate_json(client.get(finished(client, answer.json())["result_url"]).content)
    close(found, attribute(model, PROMPT, ["a", FeatureTarget(**target)]))


def test_faithfulness_is_measured_if_it_is_asked_for(client: httpx.Client, model: ReplacementModel) -> None:
    whole = attribute_whole(model, PROMPT)
    wanted = measure_faithfulness(whole, to_graph(whole, 0.8, 0.98))
    found = computed(client, faithfulness=True).faithfulness
    assert found and found.nodes == wanted.nodes
    assert found.real == pytest.approx(wanted.real, rel=1e-3, abs=1e-6)
    assert computed(client).faithfulness is None


def test_forms_of_a_graph(client: httpx.Client) -> None:
    job = finished(client, submitted(client))
    assert job["done"] == job["of"] > 0 and job["seconds"] > 0 and job["run_id"] == "one"
    address = job["result_url"]
    graph = Graph.model_validate_json(client.get(address).content)
    tracer = client.get(address, headers={"Accept": "application/vnd.circuit-graph+json"})
    assert tracer.headers["content-type"] == "application/vnd.circuit-graph+json"
    assert tracer.json() == json.loads(json.dumps(circuit_graph(graph, tracer.json()["metadata"]["slug"])))
    assert client.get(address, params={"format": "circuit-graph"}).content == tracer.content
    drawing = client.get(address, headers={"Accept": "image/svg+xml"})
    assert drawing.text == graph_svg(graph)
    assert drawing.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    page = client.get(address, headers={"Accept": "text/html,*/*;q=0.1"})
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts allow-popups; default-src 'none'")
    assert "mtcGraph.draw" in page.text and 'data-feature-url="/ui/feature/{feature}?model={run}' in page.text
    assert client.get(address, params={"format": "html"}).content == page.content
    refused = client.get(address, headers={"Accept": "image/png"})
    assert (refused.status_code, refused.json()["error_type"]) == (406, "not_acceptable")
    assert client.get(address, params={"format": "png"}).status_code == 422
    assert client.delete(job["url"]).status_code == 204
    for gone in (client.get(job["url"]), client.get(address), client.delete(job["url"])):
        assert (gone.status_code, gone.json()["error_type"]) == (404, "unknown_job")


@pytest.mark.parametrize(
    ("asked", "status", "error_type", "told"),
    [
        ({"prompt": "x" * 200}, 413, "input_too_long", "201 tokens, the limit is 128"),
        ({"max_features": 9000}, 413, "too_many_features", "max_features is 9000, the limit is 8192"),
        ({"prefix": 5}, 422, "validation", "prefix=5 is not one of the nested dictionaries"),
        ({"targets": ["ab"]}, 422, "validation", "target 'ab' is 2 tokens"),
        ({"targets": ["a", "a"]}, 422, "validation", "twice"),
        ({"targets": [{"layer": 0, "token": 1, "feature": 0}]}, 422, "validation", "layer 0 has no transcoder"),
        ({"targets": [{"layer": 1, "token": 0, "feature": 0}]}, 422, "validation", "special"),
        ({"targets": [{"layer": 1, "token": 1, "feature": 1, "x": 1}]}, 422, "validation", "x"),
        ({"targets": list(range(11))}, 422, "validation", "targets"),
        ({"targets": [300]}, 422, "validation", "token id 300"),
        ({"targets": [True]}, 422, "validation", "targets"),
        ({"node_share": 0}, 422, "validation", "node_share"),
        ({"edge_share": 1.5}, 422, "validation", "edge_share"),
        ({"prompt": ""}, 400, "empty_inputs", "prompt is empty"),
        ({"input_ids": [1]}, 422, "validation", "either"),
        ({"prompt": None}, 422, "validation", "either"),
        ({"prompt": None, "input_ids": [9999]}, 422, "validation", "token id 9999"),
        ({"model": "nothing"}, 404, "unknown_model", "no run"),
        ({"faithfulness": True, "targets": [{"layer": 1, "token": 1, "feature": 0}]}, 422, "validation", "faithfulness"),
    ],
)  # fmt: skip
def test_what_no_graph_can_be_is_refused_at_once(
    client: httpx.Client, asked: dict[str, Any], status: int, error_type: str, told: str
) -> None:
    computed(client)  # the models are in memory
    answer = client.post("/graph", json={"prompt": PROMPT} | asked)
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type), answer.text
    assert told in answer.json()["error"]


def test_another_run_takes_the_place_of_the_first(client: httpx.Client, model: ReplacementModel) -> None:
    found = computed(client, model="deep")
    assert (found.run_id, found.traced) == ("deep", (0, 2))
    for _ in range(100):  # the first is loaded again, as for any request for a run that is not in memory
        answer = client.post("/steer", json={"prompt": PROMPT, "interventions": CHANGES})
        if answer.status_code != 503:
            break
        assert answer.json()["error_type"] == "loading" and answer.headers["retry-after"] == "1"
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    late = finished(client, submitted(client, model="deep", prefix=5))  # what is not loaded says no earlier
    assert (late["state"], late["error_type"]) == ("failed", "validation") and "prefix=5" in late["error"]
    answer = client.get(late["result_url"])
    assert (answer.status_code, answer.json()["error"]) == (422, late["error"])
    close(computed(client), attribute(model, PROMPT))


def lines_of(client: httpx.Client, **asked: Any) -> list[dict[str, Any]]:
    body = {"prompt": PROMPT, "interventions": CHANGES} | asked
    with client.stream("POST", "/steer", json={k: v for k, v in body.items() if v is not None}) as answer:
        answer.read()
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.split("\n")[:-1]]


def same(found: Steered, wanted: Steered) -> None:
    for kind in ("plain", "steered"):
        for ours, theirs in zip(getattr(found, kind), getattr(wanted, kind), strict=True):
            assert (ours.token_ids, ours.tokens, ours.ended) == (theirs.token_ids, theirs.tokens, theirs.ended)
            assert ours.plain == pytest.approx(theirs.plain, abs=1e-4)
            assert ours.steered == pytest.approx(theirs.steered, abs=1e-4)
    assert {n.token_id: pytest.approx((n.plain, n.steered), abs=1e-4) for n in found.next} == {
        n.token_id: (n.plain, n.steered) for n in wanted.next
    }
    assert (found.token_ids, found.tokens, found.interventions) == (
        wanted.token_ids,
        wanted.tokens,
        wanted.interventions,
    )
    assert (found.run_id, found.base_model, found.attention) == (wanted.run_id, wanted.base_model, wanted.attention)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 6},
        {"max_tokens": 5, "n": 3, "temperature": 1.5, "seed": 4, "attention": "frozen"},
        {"max_tokens": 3, "special": True},
    ],
)
def test_steering_is_the_librarys_line_by_line(
    client: httpx.Client, model: ReplacementModel, options: dict[str, Any]
) -> None:
    computed(client)
    wanted = steer(model, PROMPT, [Intervention.model_validate(each) for each in CHANGES], **options)
    assert any(abs(n.plain - n.steered) > 0.01 for n in wanted.next)
    first, *steps, last = lines_of(client, **options)
    assert first["type"] == "prompt" and len(first["request_id"]) == 32
    assert (first["tokens"], first["run_id"]) == (list(wanted.tokens), "one")
    assert first["next"] == last["next"]
    assert last.pop("type") == "steered"
    same(Steered.model_validate(last), wanted)
    longest = max(len(each.token_ids) + each.ended for each in (*wanted.plain, *wanted.steered))
    assert [step["type"] for step in steps] == ["step"] * longest
    for kind in ("plain", "steered"):
        for row, whole in enumerate(getattr(wanted, kind)):
            drawn = [step[kind][row] for step in steps if step[kind][row] is not None]
            assert [token["token_id"] for token in drawn] == list(whole.token_ids)
    whole = client.post(
        "/steer",
        json={"prompt": PROMPT, "interventions": CHANGES, **options},
        headers={"Accept": "application/json"},
    )
    assert whole.headers["content-type"] == "application/json"
    same(Steered.model_validate_json(whole.content), wanted)


@pytest.mark.parametrize(
    ("asked", "status", "error_type", "told"),
    [
        ({"interventions": []}, 422, "validation", "interventions"),
        ({"interventions": [{"layer": 0, "feature": 1, "value": 1}]}, 422, "validation", "layer=0 has no transcoder"),
        ({"interventions": [{"layer": 1, "feature": 64, "value": 1}]}, 422, "validation", "feature=64"),
        ({"interventions": [{"layer": 1, "feature": 1, "value": 1e7}]}, 422, "validation", "value"),
        ({"interventions": [{"layer": 1, "feature": 1, "value": 1, "mode": "x"}]}, 422, "validation", "mode"),
        ({"interventions": [{"layer": "1", "feature": 1, "value": 1}]}, 422, "validation", "layer"),
        ({"n": 2}, 422, "validation", "temperature"),
        ({"max_tokens": 0}, 422, "validation", "max_tokens"),
        ({"max_tokens": 2000}, 413, "input_too_long", "the limit is"),
        ({"n": 16, "temperature": 1, "max_tokens": 400}, 413, "too_many_tokens", "64 passes over"),
        ({"messages": [{"role": "user", "content": "a"}]}, 422, "validation", "one of"),
        ({"prompt": None, "messages": [{"role": "user", "content": "a"}]}, 422, "validation", "no chat template"),
        ({"prompt": None, "messages": []}, 400, "empty_inputs", "messages is empty"),
        ({"seed": -1}, 422, "validation", "seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_steered_is_refused(
    client: httpx.Client, asked: dict[str, Any], status: int, error_type: str, told: str
) -> None:
    computed(client)
    body = {"prompt": PROMPT, "interventions": CHANGES} | asked
    answer = client.post("/steer", json={name: value for name, value in body.items() if value is not None})
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type), answer.text
    assert told in answer.json()["error"]
