"""Serving another run in the place of the one before: no request fails meanwhile, and then nobody but the new one
answers. A process that died comes back as it was."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_deployed import TEXTS, load, replicas, wait_until
from serve_local import make_run

from mtc.config import load_preset
from mtc.storage import RunDirectory, promote, roll_back
from serve.contract import Settings

SETTINGS: dict[str, Any] = {"num_cpus": 0.2, "num_threads": 1, "watch_seconds": 60}


@pytest.fixture(scope="module")
def port(ray_cluster: object) -> Iterator[int]:
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield port
    serve.shutdown()


def deploy(port: int, run: Path, **settings: Any) -> str:
    """As `python -m serve.app` does; the id of the run that it says is served."""
    from serve.app import build
    from serve.deployments import listen, roll_out

    wanted = Settings(run=str(run), **SETTINGS | settings)
    listen("127.0.0.1", port)
    return roll_out(build(wanted), wanted, print).run_id


def features_of(result: dict[str, Any]) -> list[dict[int, float]]:
    """Of each token."""
    return [{f["feature_index"]: f["activation_value"] for f in token} for token in result["features"]]


def answers_of(client: httpx.Client) -> tuple[str, list[Any]]:
    body = client.post("/encode", json={"inputs": TEXTS, "top_k": 64}).raise_for_status().json()
    return body["model"]["run_id"], [features_of(result) for result in body["results"]]


def check_a_failed_deployment(port: int, run: RunDirectory, client: httpx.Client) -> None:
    """What answers before one of a run that is damaged answers after it; nothing else is decided for its clients."""
    from serve.deployments import DeployError

    weights = Path(run.url) / "transcoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    before = answers_of(client)
    with pytest.raises(DeployError, match=r"RunError: .*transcoder\.safetensors") as failed:
        deploy(port, Path(run.url))
    assert failed.value.exit_code == 2 and "\n" not in str(failed.value)
    assert answers_of(client) == before
    assert client.post("/encode", json={"inputs": "a", "model": "b"}).status_code == 200, "in memory"
    assert client.get("/ui").status_code == 200
    for refused in (
        client.post("/admin/load", json={"model": "b"}),
        client.post("/encode", json={"inputs": "a", "model": "a"}),
        client.get("/runs"),
    ):
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        assert "another deployment" in refused.json()["error"] and refused.headers["Retry-After"]


def test_another_deployment_takes_over_and_a_crash_changes_nothing(port: int, tmp_path: Path) -> None:
    for name, seed in (("b", 5), ("c", 6), ("a", 3)):
        make_run(tmp_path / name, seed)
    url = f"http://127.0.0.1:{port}"
    assert deploy(port, tmp_path / "latest") == "a"
    with httpx.Client(base_url=url, timeout=60) as client:
        assert answers_of(client)[0] == "a"
        client.post("/admin/load", json={"model": "c"}).raise_for_status()
        expected = dict([answers_of(client)])

        for deployment in ("Control", "Server"):
            (victim,) = replicas(deployment)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: (found := replicas(deployment)) and victim not in found)  # noqa: B023
        assert answers_of(client)[0] == "c", "what was loaded by name holds after a crash"
        wait_until(lambda: client.get("/runs").status_code == 200)

        answers: list[tuple[int, float, dict[str, Any]]] = []

        def answered(number: int, response: httpx.Response) -> None:
            assert response.status_code == 200, response.text
            answers.append((number, response.request.extensions["sent"], response.json()))

        async def redeploy() -> None:
            until = asyncio.Event()
            work = asyncio.create_task(load(url, 10**9, 2, answered, until=until))
            try:
                assert await asyncio.to_thread(deploy, port, tmp_path / "b", max_inputs=len(TEXTS)) == "b"
                done, replaced = len(answers), time.monotonic()
                while len(answers) < done + 50:  # connections that are as old as the deployment before
                    await asyncio.sleep(0.01)
                    assert not work.done()
            finally:
                until.set()
                await work
            late = [body["model"]["run_id"] for _, sent, body in answers if sent > replaced]
            assert set(late) == {"b"}

        asyncio.run(redeploy())
        expected |= [answers_of(client)]
        assert client.get("/info").json()["limits"]["max_inputs"] == len(TEXTS)
        assert client.post("/encode", json={"inputs": [*TEXTS, "a"]}).status_code == 413
        for number, _, body in answers:
            wanted = expected[body["model"]["run_id"]][number % len(TEXTS)]
            for found, token in zip(features_of(body["results"][0]), wanted, strict=True):
                assert found == pytest.approx(token, rel=1e-4, abs=1e-5)
        assert {body["model"]["run_id"] for *_, body in answers} == {"b", "c"}

        client.post("/admin/load", json={"model": "c"}).raise_for_status()
        check_a_failed_deployment(port, make_run(tmp_path / "damaged", 7), client)
        assert deploy(port, tmp_path / "b", max_inputs=len(TEXTS)) == "b", "the same settings again"
        assert answers_of(client)[0] == "b"


def test_an_alias_is_served_by_its_last_usable_run(port: int, tmp_path: Path) -> None:
    """Of three that had the name, replicas can't load the model of the last; the weights of the second are damaged."""
    for seed, name in enumerate("ab", 3):
        promote(make_run(tmp_path / name, seed), "production")
    lost = load_preset("tiny", {"model": {"name": str(tmp_path / "no-model"), "dtype": "float32"}})
    promote(make_run(tmp_path / "c", 5, lost), "production")
    weights = tmp_path / "b" / "transcoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"!")
    assert deploy(port, tmp_path / "production", watch_seconds=0.2) == "a"

    def usable() -> bool:
        return 'mtc_served_name_usable{served="production"} 1.0' in client.get("/metrics").raise_for_status().text

    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answer = client.get("/readyz").raise_for_status().json()
        assert answer["status"] == "ready" and answer["detail"].startswith("production can't be served: ")
        assert "no-model" in answer["detail"] and answer["detail"].endswith("; meanwhile run a answers")
        assert answers_of(client)[0] == "a" and not usable()
        weights.write_bytes(whole)
        assert roll_back(str(tmp_path), "production").alias.run_id == "b"
        wait_until(lambda: answers_of(client)[0] == "b")
        wait_until(usable)
        assert client.get("/readyz").json() == {"status": "ready"}


def test_what_no_node_could_hold_is_refused_at_once(
    port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve.deployments import DeployError, check_room
    from serve.deployments.rollout import _lacking

    run = str(make_run(tmp_path / "a").url)
    for settings, wanted in (
        ({"num_gpus": 1}, "num_replicas=1 of 0.6 CPU and 1 GPU"),
        ({"num_cpus": 64}, "num_replicas=1 of 64 CPU"),
        ({"num_cpus": 1.5, "num_replicas": 2}, "num_replicas=2 of 1.5 CPU"),
    ):
        with pytest.raises(DeployError, match=f"no room for {wanted}, even if all of it was free") as error:
            check_room(Settings.model_validate({"run": run} | settings))
        assert error.value.exit_code == 2
    check_room(Settings(run=run, num_cpus=0.5, num_replicas=4))
    assert not _lacking(Settings(run=run, num_cpus=0.2), 1)
    assert _lacking(Settings(run=run, num_cpus=0.2), 99).startswith("99 x (0.2 CPU) are wanted, there is room for ")


def test_an_address_that_can_not_be_changed_is_refused(port: int) -> None:
    from serve.deployments import DeployError, listen

    with pytest.raises(DeployError, match=f"listens on 127.0.0.1:{port} and can't change to 127.0.0.1:1 while"):
        listen("127.0.0.1", 1)
