"""One deployment takes the place of another: its replicas start beside the old ones, which then finish and stop.

Ray Serve does the work; what is here says when it is done, why it waits, and what went wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ApplicationStatus

from mtc.errors import MtcError
from serve.contract import RunKey, Settings, State

APP = "mtc"
DEPLOY_TIMEOUT_S = 600.0
"""In which the new deployment must answer, with its models loaded, and the old one have stopped."""
ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.25


class DeployError(MtcError):
    """The service could not be deployed; what answered before answers still."""

    exit_code = 1
    event = "failed"


def listen(host: str, port: int) -> None:
    """Have Ray Serve listen there. Raises DeployError if it listens elsewhere already, which holds while it runs."""
    ray_serve.start(http_options={"host": host, "port": port})
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    found: Any = ray.get(controller.get_http_config.remote(), timeout=ANSWER_TIMEOUT_S)
    if (found.host, found.port) != (host, port):
        raise DeployError(
            f"Ray Serve of this cluster listens on {found.host}:{found.port} and can't change to {host}:{port} "
            "while it runs: name that address, or end it with `serve shutdown`"
        )


def roll_out(application: ray_serve.Application, settings: Settings, say: Callable[[str], None]) -> RunKey:
    """Deploy, and wait until this deployment answers and no other; returns the run that it answers with.

    `say` is told what is waited for. Raises DeployError.
    """
    before, lacking = APP in ray_serve.status().applications, _lacking(settings)
    if lacking and not (before and settings.max_surge_percent == 0):
        hint = "; with --set max_surge_percent=0 the replicas of before make it first" if before else ""
        say(f"waiting for room: {lacking}{hint}")
    target = ray_serve.RunTarget(application, name=APP, route_prefix="/")
    ray_serve.run_many([target], wait_for_applications_running=False)
    deadline, said = time.monotonic() + DEPLOY_TIMEOUT_S, ""
    while True:
        app = ray_serve.status().applications[APP]
        told = " ".join(_last_line(d.message) for d in app.deployments.values() if d.message)
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise DeployError(f"the service could not be deployed: {told or _last_line(app.message)}")
        states = {state for deployment in app.deployments.values() for state in deployment.replica_states}
        if app.status == ApplicationStatus.RUNNING and states == {"RUNNING"}:
            return _current_run()
        if told not in ("", said):
            say(said := told)
        if time.monotonic() > deadline:
            why = told or _lacking(settings)
            raise DeployError(f"the service is not deployed after {DEPLOY_TIMEOUT_S:g} s, Ray Serve goes on: {why}")
        time.sleep(POLL_S)


def _current_run() -> RunKey:
    """What all replicas say that they answer with."""
    replicas = ray_serve.get_deployment_handle("Server", APP).broadcast("state")
    states: list[State] = replicas.results(timeout_s=ANSWER_TIMEOUT_S)
    return max(states, key=lambda state: state.version).current


def _lacking(settings: Settings) -> str:
    """What one more replica lacks in this cluster; nothing if there is room for it."""
    need, free = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}, ray.available_resources()
    return ", ".join(
        f"a replica takes {need[name]:g} {name}, {free.get(name, 0.0):g} are free"
        for name in need
        if need[name] > free.get(name, 0.0)
    )


def _last_line(message: str) -> str:
    """The reason, of what may be pages of traceback."""
    return next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "")
