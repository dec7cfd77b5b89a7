"""Graphs and steering of the deployed service, through its real HTTP front, against mtc.circuits on the same run."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_deployed import replicas, wait_until
from serve_local import make_analysed_run

from mtc.circuits import Intervention, ablate, attribute, steer
from mtc.client import Client, Retry, ServiceError
from mtc.storage import RunDirectory
from mtc.telemetry.metrics import CIRCUITS
from serve.contract import Settings

PROMPT = "Hello, you!"
CHANGE = Intervention(layer=1, feature=5, mode="scale", value=4.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


def settings_of(run: RunDirectory, interventions: bool) -> Settings:
    return Settings(
        run=run.url, num_cpus=0.2, num_replicas=2, num_threads=1, interventions=interventions,
        interventions_num_cpus=0.2, watch_seconds=60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(ray_cluster: object, run: RunDirectory) -> Iterator[str]:
    from ray import serve

    from serve.app import build
    from serve.deployments import listen, roll_out

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = settings_of(run, True)
    listen("127.0.0.1", port)
    assert roll_out(build(settings), settings, print).run_id == "one"
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=60).raise_for_status().text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def test_whichever_replica_answers(url: str, run: RunDirectory) -> None:
    """Jobs are one process's; what is refused is so through all of it."""
    assert (len(replicas("Server")), len(replicas("Circuits"))) == (2, 1)
    wanted, told = attribute(run, PROMPT), list[dict[str, object]]()
    with Client(url) as client:
        for _ in range(3):
            found = client.graph(PROMPT, tell=told.append)
            assert [(n.kind, n.layer, n.token, n.feature) for n in found.nodes] == [
                (n.kind, n.layer, n.token, n.feature) for n in wanted.nodes
            ]
        steered = client.steer(PROMPT, [CHANGE], max_tokens=5)
        assert steered.steered[0].token_ids == steer(run, PROMPT, [CHANGE], max_tokens=5).steered[0].token_ids
        lost, here = client.ablate(PROMPT, layer=1, features=[3, 5]), ablate(run, PROMPT, 1, [3, 5])
        assert lost.first == here.first and lost.kl == pytest.approx(here.kl, rel=1e-3, abs=1e-7)
        with pytest.raises(ServiceError) as refused:
            client.graph(PROMPT, prefix=5)
        assert (refused.value.status, refused.value.error_type) == (422, "validation")
    assert {job["state"] for job in told} >= {"done"}
    assert metric(url, "mtc_graph_jobs_total") == 3 and metric(url, "mtc_steered_tokens_total") == 5
    assert metric(url, "mtc_steerings_in_flight") == 0
    shown = httpx.get(f"{url}/metrics", timeout=60).text
    assert all(f"\n{instrument.name}" in shown for instrument in CIRCUITS)


def test_who_leaves_ends_the_work(url: str) -> None:
    body = {"prompt": PROMPT, "interventions": [CHANGE.model_dump(exclude_none=True)], "max_tokens": 900}
    before = metric(url, "mtc_steered_tokens_total")
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", "/steer", json=body) as answer:
        lines = answer.iter_lines()
        assert "prompt" in next(lines) and "step" in next(lines)
    wait_until(lambda: metric(url, "mtc_steerings_in_flight") == 0)
    assert before < metric(url, "mtc_steered_tokens_total") < before + 800


def test_a_lost_process_costs_its_jobs_and_nothing_else(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        job = client.post("/graph", json={"prompt": PROMPT}).json()
        (victim,) = replicas("Circuits")
        os.kill(victim, signal.SIGKILL)
        assert client.post("/encode", json={"inputs": "a"}).status_code == 200
        wait_until(lambda: (found := replicas("Circuits")) and victim not in found)
        gone = wait_until(lambda: a if (a := client.get(job["url"])).status_code != 503 else None)
        assert gone is not None and (gone.status_code, gone.json()["error_type"]) == (404, "unknown_job")
    with Client(url, retries=Retry(attempts=30)) as again:
        assert again.graph(PROMPT).run_id == "one"


def test_another_deployment_takes_over_with_interventions_and_without(url: str, tmp_path: Path) -> None:
    from serve.app import build
    from serve.deployments import roll_out

    other = make_analysed_run(tmp_path / "two", 5)
    settings = settings_of(other, True)
    assert roll_out(build(settings), settings, print).run_id == "two"
    with Client(url, retries=Retry(attempts=30)) as client:
        assert client.graph(PROMPT).run_id == client.steer(PROMPT, [CHANGE]).run_id == "two"
        settings = settings_of(other, False)
        assert roll_out(build(settings), settings, print).run_id == "two"
        with pytest.raises(ServiceError) as refused:
            client.graph(PROMPT)
    assert (refused.value.status, refused.value.error_type) == (409, "no_interventions")
    with pytest.raises(KeyError):
        replicas("Circuits")
