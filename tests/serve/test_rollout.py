"""What is said of a deployment that Ray Serve could not make, without Ray."""

import pytest

from serve.contract import Settings
from serve.deployments import DeployError, rollout

TRACEBACK = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:mtc:Server.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
RuntimeError: Traceback (most recent call last):
  File "serve/deployments/server.py", line 1, in load
{reason}
"""


@pytest.mark.parametrize(
    ("reason", "permanent"),
    [
        ("mtc.storage.runs.RunError: /runs/a: transcoder.safetensors is damaged", True),
        ("mtc.language_model.architectures.ModelError: /models/a is no directory\nlook: there", True),
        ("mtc.language_model.architectures.ModelUnreachableError: the hub does not answer", False),
        ("serve.http.keys.KeyFileError: /keys.json cannot be read", True),
        ("ValueError: 0.0.0.0 can be reached from elsewhere", True),
        (
            "ValueError: before\n\nDuring handling of the above exception:\n\nOSError: [Errno 5] Input/output error",
            False,
        ),
        ("TimeoutError: no answer from Control or from Serve within 120 s", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
        ("mtc.not_there.Error: x", False),
    ],
)
def test_what_comes_again_is_told_from_what_may_pass(reason: str, permanent: bool) -> None:
    assert rollout._comes_again(TRACEBACK.format(reason=reason)) == permanent


def test_a_replica_needs_all_its_room_on_one_node() -> None:
    settings = Settings(run="x", num_cpus=0.6, num_gpus=0.5)
    for nodes, places in (
        ([{"CPU": 0.3, "GPU": 1.0}, {"CPU": 0.3, "GPU": 1.0}], 0),
        ([{"CPU": 4.0}, {"CPU": 0.6, "GPU": 1.0}], 1),
        ([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.6, "GPU": 1.0}], 3),
    ):
        assert rollout._places(settings, nodes) == places


def test_a_service_that_is_ended_meanwhile_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError, GetTimeoutError

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(rollout.ray_serve, "status", lambda: fail(ActorDiedError()))
    with pytest.raises(DeployError, match="was ended while it was deployed"):
        rollout._status()
    monkeypatch.setattr(rollout.ray_serve, "status", lambda: fail(GetTimeoutError()))
    assert rollout._status() is None
    monkeypatch.setattr(rollout.ray_serve, "get_deployment_handle", lambda *_: fail(GetTimeoutError()))
    assert rollout._current_run() is None
    monkeypatch.setattr(rollout.ray_serve, "start", lambda **_: fail(GetTimeoutError()))
    with pytest.raises(DeployError, match="does not start or answer"):
        rollout.listen("127.0.0.1", 1)
