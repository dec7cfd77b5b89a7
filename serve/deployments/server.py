"""The deployment that answers: HTTP, tokeniser and models in one process, so that a request makes one hop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mtc.results import Ablated
from serve.contract import (
    NO_REPLICA,
    AblateRequest,
    GraphJob,
    GraphRequest,
    LoadResponse,
    Problem,
    ReplicaMetrics,
    RunKey,
    RunSummary,
    ServiceError,
    Settings,
    Snapshot,
    State,
    SteerRequest,
    take_snapshot,
)
from serve.deployments.control import LOAD_TIMEOUT_S
from serve.http import check_binding, create_app, use_http_protocol
from serve.service import Models, Service

logger = logging.getLogger("ray.serve")
T = TypeVar("T")

CONTROL_TIMEOUT_S = 15.0
"""In which Control answers a client's question, beside those that load a run; its own of all replicas takes 10 s."""
STEP_TIMEOUT_S = 600.0
"""In which Circuits answers where a pass through the language model is waited for; `request_timeout_s` comes first."""
START_TIMEOUT_S = 120.0
"""In which a replica that starts must have learned from Control which runs answer, and from Serve who can connect."""


class RemoteControl:
    """`serve.service.Control` by the deployment of that name, for a replica of `deployment`.

    All raise ServiceError 503, too, where it does not answer: it is starting, or lost.
    """

    def __init__(self, control: DeploymentHandle, deployment: str):
        self._control, self._deployment = control, deployment

    async def want(self, run_id: str) -> RunKey:
        return await _answer(self._control.want.remote(self._deployment, run_id), CONTROL_TIMEOUT_S)

    async def runs(self) -> list[RunSummary]:
        return await _answer(self._control.runs.remote(self._deployment), CONTROL_TIMEOUT_S)

    async def load(self, run_id: str) -> LoadResponse:
        return await _answer(self._control.load.remote(self._deployment, run_id), LOAD_TIMEOUT_S)

    async def metrics(self) -> bytes:
        return await _answer(self._control.metrics.remote(), CONTROL_TIMEOUT_S)


class RemoteInterventions:
    """`serve.service.Interventions` by the deployment `Circuits`, for a replica of `deployment`."""

    def __init__(self, circuits: DeploymentHandle, deployment: str):
        self._circuits, self._deployment = circuits, deployment

    async def submit(self, key: RunKey, asked: GraphRequest, owner: str) -> GraphJob:
        return await self._ask("submit", CONTROL_TIMEOUT_S, key, asked, owner)

    async def status(self, job_id: str, owner: str) -> GraphJob:
        return await self._ask("status", CONTROL_TIMEOUT_S, job_id, owner)

    async def result(self, job_id: str, owner: str) -> bytes:
        return await self._ask("result", CONTROL_TIMEOUT_S, job_id, owner)

    async def cancel(self, job_id: str, owner: str) -> None:
        await self._ask("cancel", CONTROL_TIMEOUT_S, job_id, owner)

    async def steer(self, key: RunKey, asked: SteerRequest) -> tuple[str, dict[str, Any]]:
        return await self._ask("steer", STEP_TIMEOUT_S, key, asked)

    async def step(self, steered_id: str) -> dict[str, Any]:
        return await self._ask("step", STEP_TIMEOUT_S, steered_id)

    async def end(self, steered_id: str) -> None:
        await self._ask("end", CONTROL_TIMEOUT_S, steered_id)

    async def ablate(self, key: RunKey, asked: AblateRequest) -> Ablated:
        return await self._ask("ablate", STEP_TIMEOUT_S, key, asked)

    async def _ask(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        asked = getattr(self._circuits, method).remote(self._deployment, *arguments)
        return await _answer(asked, timeout_s, CIRCUITS_SILENT)


# Larger than this service's own limits, so that it refuses first, with its error shape, and the probes are answered.
@ray_serve.deployment(max_ongoing_requests=2048, max_queued_requests=2048, health_check_timeout_s=60)
@ray_serve.ingress()
class Server:
    """A replica. It is ready when the runs that answer are loaded."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, control: DeploymentHandle, deployment: str, circuits: DeploymentHandle | None = None
    ):
        await _in_time(_check_binding(settings))
        _use_threads(settings)
        self._metrics = ReplicaMetrics()
        # Serve starts uvicorn once this has returned, and does not let its protocol be chosen.
        use_http_protocol(self._metrics)
        self._control, self._deployment = control, deployment
        self._models = Models(settings, self._metrics)
        state, loaded = await _in_time(_decided(control, deployment)), None
        remote = RemoteControl(control, deployment)
        interventions = RemoteInterventions(circuits, deployment) if circuits is not None else None
        self._service = Service(settings, self._models, remote, state, self._metrics, interventions)
        self.replica_id = ray_serve.get_replica_context().replica_id.unique_id
        while state.loaded != loaded:  # a replica that can't answer must not become healthy
            try:
                for key in state.loaded:
                    await self._open(key)
            except Exception as error:
                given_up = await _give_up(control, deployment, key, Problem.of(error))
                if given_up is None or key in given_up.loaded:
                    raise
                state = given_up
            else:
                loaded = state.loaded
                state = await _in_time(_decided(control, deployment))  # it may have changed meanwhile
            self._service.use(state)
        self._reporter = asyncio.create_task(self._report())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, name_requests=False)  # Serve does

    async def load(self, deployment: str, key: RunKey) -> Problem | None:
        """Have a run ready; what is wrong with it, or None. NO_REPLICA if this is none of that deployment."""
        if deployment != self._deployment:
            return NO_REPLICA
        try:
            await self._open(key)
        except Exception as error:
            return Problem.of(error)
        return None

    async def unload(self, deployment: str, key: RunKey) -> None:
        """Let go of a run's models, if this is a replica of that deployment."""
        if deployment == self._deployment:
            self._models.unload(key)

    async def state(self) -> State:
        """Which runs answer here."""
        return self._service.state

    async def use(self, state: State) -> None:
        """Answer by these runs from now on; requests that have begun end with theirs."""
        self._service.use(state)

    async def totals(self) -> tuple[str, Snapshot]:
        """This replica's id and counts."""
        return self.replica_id, take_snapshot(self._metrics.registry)

    async def _open(self, key: RunKey) -> None:
        await self._models.load(key)
        await self._service.open(key, LOAD_TIMEOUT_S)

    async def _report(self) -> None:
        """Leave the counts where they outlive this replica, and learn the state, should a call have been missed."""
        while True:
            await asyncio.sleep(1)
            used = self._service.take_used()
            try:
                _, totals = await self.totals()
                told = self._control.report.remote(self.replica_id, totals, self._service.state, used)
                self._service.use(await _answer(told, CONTROL_TIMEOUT_S))
            except Exception as error:
                logger.warning("no word from the control: %s: %s", type(error).__name__, error)


async def _in_time(answer: Awaitable[T]) -> T:
    """What a replica must know to start."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            return await answer
    except TimeoutError:
        raise TimeoutError(f"no answer from Control or from Serve within {START_TIMEOUT_S:g} s") from None


async def _decided(control: DeploymentHandle, deployment: str) -> State:
    """What the control of this deployment has decided; while it starts, that of the one before may still answer."""
    while (state := await control.state.remote()).deployment != deployment:
        await asyncio.sleep(0.1)
    return state


async def _give_up(control: DeploymentHandle, deployment: str, key: RunKey, reason: Problem) -> State | None:
    """What the control decides of a run that can't be loaded here; None if it does not answer."""
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):  # it verifies what may take the run's place
            return await control.give_up.remote(deployment, key, reason)
    except (TimeoutError, RayActorError, DeploymentUnavailableError):
        return None


async def _check_binding(settings: Settings) -> None:
    """Refuse to start without keys where others can connect. Raises ValueError, and what Serve raises: then nobody
    knows who could."""
    if settings.api_keys_file is None:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        options = await controller.get_http_config.remote()
        check_binding(options.host or "0.0.0.0", None)


def _use_threads(settings: Settings) -> None:
    """Ray sets one thread for an actor that reserves less than two CPUs."""
    if settings.device == "cpu":
        # Not at the top: whoever only deploys the service can do without PyTorch, 2 s and 220 MB.
        import torch

        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(settings.num_threads or max(1, cores // settings.num_replicas))


CONTROL_SILENT = "what decides about runs does not answer now; runs in memory still do"
CIRCUITS_SILENT = "what computes graphs and interventions does not answer now; ask again"


async def _answer(asked: Awaitable[Any], timeout_s: float, silent: str = CONTROL_SILENT) -> Any:
    """What another deployment answers. Raises ServiceError: what it returns as one, and 503 if it does not answer."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await asked
    except (TimeoutError, RayActorError, DeploymentUnavailableError) as error:
        message = f"{silent} ({type(error).__name__})"
        raise ServiceError(503, "unavailable", message, headers={"Retry-After": "5"}) from error
    if isinstance(answer, ServiceError):
        raise answer
    return answer
