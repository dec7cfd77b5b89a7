"""One deployment takes the place of another: its replicas start beside the old ones, which then finish and stop.

Ray Serve does the work; what is here says when it is done, why it waits, and what went wrong.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray import serve as ray_serve
from ray._private.state import available_resources_per_node, state
from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from mtc.errors import MtcError, one_line
from serve.contract import RunKey, Settings, State

APP = "mtc"
DEPLOY_TIMEOUT_S = 600.0
"""In which the new deployment must answer, with its models loaded, and the old one have stopped."""
ANSWER_TIMEOUT_S = 30.0
"""In which Serve's controller, and all replicas, must answer a question; replicas are asked again until the
deployment's time is over."""
POLL_S = 0.25
_NAMED = re.compile(r"(?:(?P<module>(?:mtc|serve)(?:\.\w+)*)\.)?(?P<name>[A-Za-z]\w*): ")
"""How a traceback's last line names an exception of ours, or one of Python's own."""


class DeployError(MtcError):
    """The service could not be deployed; what answered before answers still, see docs/serving.md."""

    exit_code = 1
    event = "failed"


class HopelessError(DeployError):
    """As DeployError, for what comes again until something is changed."""

    exit_code = 2


def check_room(settings: Settings) -> None:
    """Raises HopelessError if the cluster could not hold the replicas and what computes interventions if all of it was
    free, unless an autoscaler may add nodes."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if _places(settings, nodes) >= settings.num_replicas or state.get_max_resources_from_cluster_config() is not None:
        return
    largest = " and ".join(
        f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}" for name in _need(settings)
    )
    raise HopelessError(
        f"this cluster has no room for num_replicas={settings.num_replicas} of {_each(settings)}{_beside(settings)}, "
        f"even if all of it was free: it has {len(nodes)} nodes, of {largest} at most"
    )


def listen(host: str, port: int) -> None:
    """Have Ray Serve listen there. Raises DeployError if it listens elsewhere already, which holds while it runs, or
    does not answer."""
    try:
        ray_serve.start(http_options={"host": host, "port": port})
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        found: Any = ray.get(controller.get_http_config.remote(), timeout=ANSWER_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError, ValueError) as error:
        raise DeployError(f"Ray Serve of this cluster does not start or answer: {one_line(error)}") from error
    if (found.host, found.port) != (host, port):
        raise DeployError(
            f"Ray Serve of this cluster listens on {found.host}:{found.port} and can't change to {host}:{port} "
            "while it runs: name that address, or end it with `serve shutdown`"
        )


def roll_out(application: ray_serve.Application, settings: Settings, say: Callable[[str], None]) -> RunKey:
    """Deploy, and wait until this deployment answers and no other; returns the run that it answers with.

    `say` is told what is waited for. Raises DeployError.
    """
    try:
        before = APP in ray_serve.status().applications
        lacking = _lacking(settings, 1 if before else settings.num_replicas)
        if lacking and not (before and settings.max_surge_percent == 0):
            hint = "; with --set max_surge_percent=0 the replicas of before make it first" if before else ""
            say(f"waiting for room: {lacking}{hint}")
        target = ray_serve.RunTarget(application, name=APP, route_prefix="/")
        ray_serve.run_many([target], wait_for_applications_running=False)
    except (RayError, RayServeException, TimeoutError) as error:
        raise DeployError(f"Ray Serve does not take the deployment: {one_line(error)}") from error
    deadline, said = time.monotonic() + DEPLOY_TIMEOUT_S, ""
    while True:
        app, told = _status(), ""
        if app is not None:
            told = " ".join(_last_line(d.message) for d in app.deployments.values() if d.message)
            if app.status == ApplicationStatus.DEPLOY_FAILED:
                messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
                kind = HopelessError if any(map(_comes_again, messages)) else DeployError
                raise kind(f"the service could not be deployed: {told or _last_line(app.message)}")
            states = {state for deployment in app.deployments.values() for state in deployment.replica_states}
            if app.status == ApplicationStatus.RUNNING and states == {"RUNNING"} and (key := _current_run()):
                return key
        if told not in ("", said):
            say(said := told)
        if time.monotonic() > deadline:
            why = told or _lacking(settings, 1) or "not all replicas answer"
            raise DeployError(f"the service is not deployed after {DEPLOY_TIMEOUT_S:g} s, Ray Serve goes on: {why}")
        time.sleep(POLL_S)


def _status() -> ApplicationStatusOverview | None:
    """What Serve says of the deployment; None while it does not answer. Raises DeployError if it is gone."""
    try:
        applications = ray_serve.status().applications
    except ActorDiedError:
        applications = {}
    except (RayError, RayServeException, TimeoutError):
        return None
    if APP not in applications:
        raise DeployError("the service was ended while it was deployed, as by `serve shutdown`")
    return applications[APP]


def _current_run() -> RunKey | None:
    """What all replicas say that they answer with; None if they do not, or the handle knows of none yet."""
    try:
        replicas = ray_serve.get_deployment_handle("Server", APP).broadcast("state")
        states: list[State] = replicas.results(timeout_s=ANSWER_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError):
        return None  # a replica has died since, which Serve's status will say
    return max(states, key=lambda state: state.version).current if states else None


def _need(settings: Settings) -> dict[str, float]:
    return {name: n for name, n in (("CPU", settings.num_cpus), ("GPU", settings.num_gpus)) if n}


def _need_beside(settings: Settings) -> dict[str, float]:
    """What the process of graphs and interventions needs; nothing without one."""
    if not settings.interventions:
        return {}
    amounts = (("CPU", settings.interventions_num_cpus), ("GPU", settings.interventions_num_gpus))
    return {name: n for name, n in amounts if n}


def _words(need: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in need.items())


def _each(settings: Settings) -> str:
    return _words(_need(settings))


def _beside(settings: Settings) -> str:
    need = _need_beside(settings)
    return f" beside {_words(need)} for interventions" if need else ""


def _places(settings: Settings, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many replicas nodes with these resources hold, beside what computes interventions; each must find all that it
    needs on one."""
    need, beside, found = _need(settings), _need_beside(settings), list(nodes)

    def holds(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
        return min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items())

    alone = [holds(node, need) for node in found]
    if not beside:
        return sum(alone)
    left = [
        holds({name: node.get(name, 0.0) - beside.get(name, 0.0) for name in need}, need) - own
        for node, own in zip(found, alone, strict=True)
        if holds(node, beside)
    ]
    return sum(alone) + max(left) if left else 0


def _lacking(settings: Settings, wanted: int) -> str:
    """What so many more replicas lack in this cluster; nothing if there is room for them."""
    nodes = list(available_resources_per_node().values())
    places = _places(settings, nodes)
    if places >= wanted:
        return ""
    free = " and ".join(
        f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}" for name in _need(settings)
    )
    return (
        f"{wanted} x ({_each(settings)}){_beside(settings)} are wanted, there is room for {places}; "
        f"a node has {free} free at most"
    )


def _comes_again(message: str) -> bool:
    """Whether a replica failed by what is permanently wrong: one of our errors that says so, or a value that we refuse.

    Serve has the text of a replica's traceback and no more; what it names decides. Anything else (memory, storage that
    does not answer, time that was over) may pass.
    """
    for line in reversed(message.splitlines()):
        if found := _NAMED.match(line):
            try:
                module = importlib.import_module(found["module"] or "builtins")
            except ImportError:
                continue  # it only looks like a name
            kind = getattr(module, found["name"], None)
            if isinstance(kind, type) and issubclass(kind, MtcError):
                return kind.exit_code == 2
            if isinstance(kind, type) and issubclass(kind, Exception):
                return issubclass(kind, ValueError | ImportError)
    return False


def _last_line(message: str) -> str:
    """The reason, of what may be pages of traceback."""
    return next((line.strip() for line in reversed(message.splitlines()) if line.strip()), "")
