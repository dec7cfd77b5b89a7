"""Graphs and steering over HTTP, against mtc.circuits called directly on the same run."""

import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_local import (
    LocalControl,
    key_of,
    make_analysed_run,
    make_layers_run,
    make_service,
    served,
    serving,
    wait_for_interventions,
)

import mtc.circuits.faithfulness
import mtc.circuits.graph
from mtc.circuits import FeatureTarget, Intervention, ReplacementModel, attribute, steer
from mtc.circuits.attribution import attribute_whole
from mtc.export.circuit_graph import circuit_graph
from mtc.report.graph_svg import graph_svg
from mtc.results import Graph, Steered
from mtc.storage import RunDirectory
from serve.contract import GraphRequest, RunKey, ServiceError, Settings, SteerRequest
from serve.http import keys
from serve.service import Circuits
from serve.service.circuit_model import load_replacement
from serve.service.graph_jobs import Graphs
from serve.service.steering import Steerings
from serve.service.turns import Turns

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
    wanted = attribute(model, PROMPT, faithfulness=64).faithfulness
    found = computed(client, faithfulness=True).faithfulness
    assert found and wanted and found.nodes == wanted.nodes
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
        ({"targets": ["ab"]}, 422, "validation", "targets[0] is 2 tokens: one is wanted"),
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
        ({"faithfulness": True, "targets": [{"layer": 1, "token": 1, "feature": 0}]}, 422, "validation", "next tokens"),
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


class Slow:
    """Makes graphs as slow as a test wants: each goes on, from step to step, when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.began, self.may_go_on, self.ended = threading.Event(), threading.Event(), list[str]()
        slow = self

        def whole(model: Any, prompt: Any, targets: Any, prefix: Any, most: int, tell: Any, *limits: Any) -> Any:
            def slowly(done: int, of: int) -> None:
                slow.began.set()
                while not slow.may_go_on.wait(0.01):
                    tell(done, of)
                tell(done, of)

            try:
                found = attribute_whole(model, prompt, targets, prefix, most, slowly, *limits)
            except BaseException as error:
                slow.ended.append(type(error).__name__)
                raise
            slow.ended.append("done")
            return found

        monkeypatch.setattr("mtc.circuits.attribution.attribute_whole", whole)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    found = Slow(monkeypatch)
    yield found
    found.may_go_on.set()


def until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_queue_is_bounded_and_jobs_can_be_cancelled(run: RunDirectory, slow: Slow) -> None:
    with (
        served(run, interventions=True, max_graph_jobs=3) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        jobs = [submitted(client, prefix=4) for _ in range(3)]
        assert [client.get(job["url"]).json()["ahead"] for job in jobs] == [0, 1, 2]
        assert len({job["id"] for job in jobs}) == 3 and all(len(job["id"]) >= 22 for job in jobs)
        refused = client.post("/graph", json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert refused.json()["detail"] == {"limit": 3, "value": 4} and refused.headers["retry-after"] == "2"
        assert slow.began.wait(60)
        until(lambda: client.get(jobs[0]["url"]).json()["done"] > 0)
        first = client.get(jobs[0]["url"]).json()
        assert first["state"] == "running" and first["of"] >= first["done"]
        early = client.get(first["result_url"])
        assert (early.status_code, early.json()["error_type"]) == (409, "not_done")
        assert early.json()["detail"] == {"state": "running"}
        # One that waits makes room at once; one that runs ends at its next step, and the next begins.
        assert client.delete(jobs[1]["url"]).status_code == 204
        jobs.append(submitted(client))
        assert client.delete(jobs[0]["url"]).status_code == 204
        until(lambda: slow.ended)
        assert slow.ended == ["_Cancelled"]
        assert [client.get(job["url"]).status_code for job in jobs] == [404, 404, 200, 200]
        slow.may_go_on.set()
        assert [finished(client, job)["state"] for job in jobs[2:]] == ["done", "done"]
        assert slow.ended == ["_Cancelled", "done", "done"]


def test_steering_takes_turns_with_a_graph(run: RunDirectory, model: ReplacementModel, slow: Slow) -> None:
    """A prompt is steered while a graph is computed, and neither changes the other."""
    with served(run, interventions=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        job = submitted(client)
        assert slow.began.wait(60)
        *_, last = lines_of(client, max_tokens=5)
        wanted = steer(model, PROMPT, [Intervention.model_validate(each) for each in CHANGES], max_tokens=5)
        del last["type"]
        same(Steered.model_validate(last), wanted)
        assert slow.ended == []
        slow.may_go_on.set()
        close(
            Graph.model_validate_json(client.get(finished(client, job)["result_url"]).content), attribute(model, PROMPT)
        )


def test_steering_is_bounded_and_ends_with_its_client(run: RunDirectory) -> None:
    service = make_service(LocalControl(run), interventions=True, max_steerings=2, max_input_tokens=1024)
    circuits: Circuits = service.interventions.circuits  # type: ignore[attr-defined]
    steerings = circuits.steerings
    key = key_of(run)
    circuits.open(key)
    asked = SteerRequest.model_validate({"prompt": PROMPT, "interventions": CHANGES, "max_tokens": 900})
    begun = [steerings.begin(key, asked)[0] for _ in range(2)]
    with pytest.raises(ServiceError) as refused:
        steerings.begin(key, asked)
    assert (refused.value.status, refused.value.detail) == (429, {"limit": 2, "value": 3})
    assert steerings.step(begun[0])["type"] == "step"
    steerings.end(begun[0])
    with pytest.raises(ServiceError) as gone:
        steerings.step(begun[0])
    assert gone.value.status == 404
    steerings.end(steerings.begin(key, asked)[0])
    steerings._steered[begun[1]].fetched -= 100  # type: ignore[union-attr]
    steerings.begin(key, asked)
    steerings.begin(key, asked)  # what nobody fetches any more makes room
    circuits.close()


def test_who_leaves_ends_the_work(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = Steerings.step
    monkeypatch.setattr(Steerings, "step", lambda self, name: steps.append(name) or step(self, name))
    ends = []
    end = Steerings.end
    monkeypatch.setattr(Steerings, "end", lambda self, name: ends.append(name) or end(self, name))

    def endless(key: RunKey, settings: Settings) -> ReplacementModel:
        found = load_replacement(key, settings)
        found.ends = set()
        return found

    with served(run, load=endless, interventions=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_for_interventions(client)
        ends.clear(), steps.clear()
        body = {"prompt": PROMPT, "interventions": CHANGES, "max_tokens": 900, "n": 2, "temperature": 5.0}
        body |= {"attention": "frozen", "seed": 3}
        with client.stream("POST", "/steer", json=body) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines))["type"] == "prompt"
            assert json.loads(next(lines))["type"] == "step"
        until(lambda: ends)
        time.sleep(0.3)
        made = len(steps)
        time.sleep(0.3)
        assert len(steps) == made < 800


def test_without_the_setting_nothing_is_there(run: RunDirectory) -> None:
    with served(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        for answer in (
            client.post("/graph", json={"prompt": PROMPT}),
            client.post("/steer", json={"prompt": PROMPT, "interventions": CHANGES}),
            client.get("/graph/x"),
            client.get("/graph/x/result"),
            client.delete("/graph/x"),
        ):
            assert (answer.status_code, answer.json()["error_type"]) == (409, "no_interventions")
            assert "--interventions" in answer.json()["error"] and "whole language model" in answer.json()["error"]
        assert client.get("/info").json()["interventions"] is False
        page = client.get("/ui/graph", headers={"Accept": "text/html"})
        assert page.status_code == 200 and "--interventions" in page.text and "ask_graph.js" not in page.text


def test_without_the_setting_a_replica_imports_no_circuits(run: RunDirectory) -> None:
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent), *sys.path]!r}
import asyncio, httpx, numpy
from serve.http import create_app
from serve.contract import *
from serve.service import *
import serve.app
from serve_local import LocalControl, make_service
from mtc.storage import RunDirectory
service = make_service(LocalControl(RunDirectory({run.url!r})))
app = create_app(service)
asyncio.run(service.models.encode_windows(service.state.current, [numpy.ones(3, numpy.int32)], Options(top_k=1)))
print(sorted(name for name in sys.modules if name.startswith("mtc.circuits")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nobody_learns_of_anothers_jobs(run: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    found = {name: keys.add_key(file, name, admin=name == "ops", expires=None) for name in ("ann", "bob", "ops")}
    again = keys.add_key(file, "ann", admin=False, expires=None)  # while hers is being replaced
    with served(run, interventions=True, api_keys_file=str(file)) as url:

        def client(key: str) -> httpx.Client:
            return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})

        with (
            client(found["ann"]) as ann,
            client(found["bob"]) as bob,
            client(found["ops"]) as ops,
            client(again) as new,
        ):
            job = finished(ann, submitted(ann))
            for other in (bob, ops):
                for answer in (other.get(job["url"]), other.get(job["result_url"]), other.delete(job["url"])):
                    assert (answer.status_code, answer.json()["error_type"]) == (404, "unknown_job")
            assert new.get(job["result_url"]).status_code == 200
            with httpx.Client(base_url=url) as nobody:
                for answer in (nobody.get(job["url"]), nobody.delete(job["url"]), nobody.post("/steer", json={})):
                    assert answer.status_code == 401
            assert ann.delete(job["url"]).status_code == 204


def test_what_is_kept_is_bounded(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    circuits, key = Circuits(Settings(run=run.url, interventions=True)), key_of(run)
    asked = GraphRequest.model_validate({"prompt": PROMPT, "prefix": 4})

    def make() -> str:
        job = circuits.graphs.submit(key, asked, "me")
        until(lambda: circuits.graphs.status(job.id, "me").state == "done")
        return job.id

    def kept(made: Sequence[str]) -> list[bool]:
        return [each in circuits.graphs._jobs for each in made]

    monkeypatch.setattr("serve.service.graph_jobs.KEPT_JOBS", 2)
    made = [make() for _ in range(3)]
    assert kept(made) == [False, True, True]
    with pytest.raises(ServiceError) as gone:
        circuits.graphs.result(made[0], "me")
    assert gone.value.status == 404
    monkeypatch.setattr("serve.service.graph_jobs.KEPT_BYTES", len(circuits.graphs.result(made[1], "me")) + 100)
    made.append(make())
    assert kept(made) == [False, False, False, True]
    circuits.close()


def test_a_run_that_cannot_be_loaded_is_told(run: RunDirectory, tmp_path: Path) -> None:
    def fail(key: RunKey, settings: Settings) -> ReplacementModel:
        raise OSError("the model's files are gone")

    with served(run, load=fail, interventions=True) as url, httpx.Client(base_url=url, timeout=60) as client:
        job = finished(client, submitted(client))
        assert (job["state"], job["error_type"]) == ("failed", "run_unusable") and "files are gone" in job["error"]
        assert client.get(job["result_url"]).status_code == 409
        answer = client.post("/steer", json={"prompt": PROMPT, "interventions": CHANGES})
        assert (answer.status_code, answer.json()["error_type"]) == (409, "run_unusable")
        assert client.post("/encode", json={"inputs": "a"}).status_code == 200


def test_one_models_memory_at_a_time(run: RunDirectory, tmp_path: Path) -> None:
    """The old one is dropped before the new one is loaded, when nobody steers with it any more."""
    other = make_analysed_run(tmp_path / "other", 5)
    alive, seen, begun = list[weakref.ref[ReplacementModel]](), list[int](), threading.Event()

    def load(key: RunKey, settings: Settings) -> ReplacementModel:
        seen.append(sum(each() is not None for each in alive))
        begun.set()
        found = load_replacement(key, settings)
        alive.append(weakref.ref(found))
        return found

    circuits = Circuits(Settings(run=run.url, interventions=True), load=load)
    circuits.open(key_of(run))
    asked = SteerRequest.model_validate({"prompt": PROMPT, "interventions": CHANGES, "max_tokens": 9})
    steered, _ = circuits.steerings.begin(key_of(run), asked)
    begun.clear()
    job = circuits.graphs.submit(key_of(other), GraphRequest.model_validate({"prompt": PROMPT}), "")
    until(lambda: circuits.graphs.status(job.id, "").state == "loading")
    assert not begun.wait(2)
    assert circuits.steerings.step(steered)["type"] == "step"  # it goes on
    circuits.steerings.end(steered)
    until(lambda: circuits.graphs.status(job.id, "").state == "done")

    def failed(key: RunKey) -> None:
        job = circuits.graphs.submit(key, GraphRequest.model_validate({"prompt": PROMPT, "prefix": 5}), "")
        until(lambda: circuits.graphs.status(job.id, "").state == "failed")
        with pytest.raises(ServiceError, match="prefix=5"):
            circuits.graphs.result(job.id, "")

    failed(key_of(run))  # which is loaded for it; what it failed with holds nothing of it
    failed(key_of(other))
    assert seen == [0, 0, 0, 0]
    # Neither is a model dropped while a pass runs whose client has left.
    circuits.open(key_of(run))
    steered, _ = circuits.steerings.begin(key_of(run), asked)
    found = circuits.steerings._steered[steered]
    assert found is not None
    begun.clear()
    with found.busy:
        leaving = threading.Thread(target=circuits.steerings.end, args=(steered,))
        leaving.start()
        until(lambda: steered not in circuits.steerings._steered)
        circuits.graphs.submit(key_of(other), GraphRequest.model_validate({"prompt": PROMPT}), "")
        assert not begun.wait(1.5)
    assert begun.wait(60)
    leaving.join()
    circuits.close()


def test_a_run_that_is_steered_comes_between_graphs_of_another(run: RunDirectory, tmp_path: Path) -> None:
    """What was loaded for whoever was told to ask again is there when they do."""
    other, loads = make_analysed_run(tmp_path / "other", 5), list[str]()

    def load(key: RunKey, settings: Settings) -> ReplacementModel:
        loads.append(key.run_id)
        return load_replacement(key, settings)

    circuits = Circuits(Settings(run=run.url, interventions=True, max_graph_jobs=100), load=load)
    circuits.open(key_of(run))
    graphs = [GraphRequest.model_validate({"prompt": PROMPT, "prefix": 4})] * 3
    asked = SteerRequest.model_validate({"prompt": PROMPT, "interventions": CHANGES, "max_tokens": 1})
    jobs = [circuits.graphs.submit(key_of(run), each, "") for each in graphs]
    with pytest.raises(ServiceError, match="being loaded"):
        circuits.steerings.begin(key_of(other), asked)
    jobs += [circuits.graphs.submit(key_of(run), each, "") for each in graphs]
    until(lambda: loads == ["one", "other"])
    time.sleep(1.5)  # longer than a client that is told to wait for a second
    steered, _ = circuits.steerings.begin(key_of(other), asked)
    circuits.steerings.end(steered)
    until(lambda: all(circuits.graphs.status(job.id, "").state == "done" for job in jobs))
    assert loads == ["one", "other", "one"]
    circuits.close()


def test_a_job_that_nobody_waits_for_any_more_is_cancelled(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Graphs.submit

    def slowly(self: Graphs, *asked: Any) -> Any:
        time.sleep(1.2)
        return submit(self, *asked)

    monkeypatch.setattr(Graphs, "submit", slowly)
    service = make_service(LocalControl(run), interventions=True, request_timeout_s=0.5)
    graphs: Graphs = service.interventions.circuits.graphs  # type: ignore[attr-defined]
    cancelled = list[str]()
    cancel = Graphs.cancel
    monkeypatch.setattr(Graphs, "cancel", lambda self, *job: cancelled.append(job[0]) or cancel(self, *job))
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/graph", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error_type"]) == (504, "timeout"), answer.text
        until(lambda: cancelled and not graphs._jobs)


def test_other_work_is_let_in_and_a_graph_can_be_cancelled_to_its_very_end(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the edges are known, what is left is done in parts, too."""
    circuits, parts = Circuits(Settings(run=run.url, interventions=True)), list[str]()
    began, may_go_on = threading.Event(), threading.Event()

    def slow(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            parts.append(name)
            if len(parts) > 1:
                began.set()
                may_go_on.wait(60)
            return of(*arguments)

        return called

    monkeypatch.setattr("mtc.circuits.graph._scores", slow("scores", mtc.circuits.graph._scores))
    monkeypatch.setattr("mtc.circuits.faithfulness._targets", slow("passes", mtc.circuits.faithfulness._targets))
    circuits.open(key_of(run))
    asked = GraphRequest.model_validate({"prompt": PROMPT, "faithfulness": True})
    job = circuits.graphs.submit(key_of(run), asked, "")
    assert began.wait(60)
    circuits.graphs.cancel(job.id, "")
    may_go_on.set()
    until(lambda: not circuits.graphs._pending)
    assert parts == ["scores", "scores"]
    circuits.close()


def test_turns_are_taken_in_order() -> None:
    turns, order = Turns(), list[str]()
    inside = threading.Event()

    def other(name: str) -> None:
        inside.set()
        with turns.turn():
            order.append(name)

    with turns.turn():
        turns.let_others()  # nobody waits
        for name in ("a", "b"):
            threading.Thread(target=other, args=(name,)).start()
            until(lambda n=name: turns._next == turns._served + 2 + "ab".index(n))
        turns.let_others()
        order.append("self")
    until(lambda: len(order) == 3)
    assert order == ["a", "b", "self"]
