"""The deployment that speaks HTTP and tokenises; it holds no model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.contract import (
    Encoded,
    IngressMetrics,
    LoadResponse,
    Options,
    RunKey,
    RunSummary,
    ServiceError,
    Settings,
    Snapshot,
    State,
    take_snapshot,
)
from serve.http import check_binding, create_app
from serve.service import Service

if TYPE_CHECKING:
    import numpy as np
    from fastapi import FastAPI
    from numpy.typing import NDArray

logger = logging.getLogger("ray.serve")
T = TypeVar("T")

ATTEMPTS = 3


class RayBackend:
    """`serve.service.Backend` by the other two deployments."""

    def __init__(self, encoder: DeploymentHandle, control: DeploymentHandle, metrics: IngressMetrics):
        # Serve's default, cloudpickle, can also send classes, which takes its time.
        self._encoder = encoder.options(request_serialization="pickle", response_serialization="pickle")
        self._control, self._metrics = control, metrics
        self.used: set[RunKey] = set()

    async def state(self) -> State:
        return await self._control.state.remote()

    async def want(self, run_id: str) -> RunKey:
        return _value(await self._control.want.remote(run_id))

    async def encode(self, key: RunKey, windows: Sequence[NDArray[np.int32]], options: Options) -> list[Encoded]:
        self.used.add(key)
        return _value(await self._call("encode", key, list(windows), options))

    async def decode(
        self, key: RunKey, tokens: int, token: NDArray[np.int64], feature: NDArray[np.int64],
        value: NDArray[np.float32], prefix: int | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        self.used.add(key)
        return _value(await self._call("decode", key, tokens, token, feature, value, prefix))

    async def runs(self) -> list[RunSummary]:
        return await self._control.runs.remote()

    async def load(self, run_id: str) -> LoadResponse:
        return _value(await self._control.load.remote(run_id))

    async def metrics(self) -> bytes:
        return await self._control.metrics.remote()

    async def _call(self, method: str, *arguments: Any) -> Any:
        """By another replica if the first one died: nothing changes, so that a repetition is safe."""
        for attempt in range(ATTEMPTS):
            response = getattr(self._encoder, method).remote(*arguments)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()  # whoever asked is gone: the batch is to be without this
                raise
            except BackPressureError as error:
                raise ServiceError(429, "overloaded", error.message, headers={"Retry-After": "1"}) from error
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
                logger.warning("attempt %d of %s was lost: %s", attempt + 1, method, type(error).__name__)
                self._metrics.retries.inc()
        message = "the processes that hold the models are lost; they are being replaced"
        raise ServiceError(503, "encoder_unavailable", message, headers={"Retry-After": "2"})


# Larger than this service's own limits, so that it refuses first, with its error shape, and the probes are answered.
@ray_serve.deployment(max_ongoing_requests=2048, max_queued_requests=2048, health_check_timeout_s=60)
@ray_serve.ingress()
class Ingress:
    """A replica."""

    async def __init__(self, settings: Settings, encoder: DeploymentHandle, control: DeploymentHandle):  # type: ignore[misc]
        await _check_binding(settings)
        self._control = control
        metrics = IngressMetrics()
        self._backend = RayBackend(encoder, control, metrics)
        self._service = Service(settings, self._backend, await self._backend.state(), metrics)
        self.replica_id = ray_serve.get_replica_context().replica_id.unique_id
        await self._service.open(self._service.state.current)
        self._reporter = asyncio.create_task(self._report())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)

    async def open(self, key: RunKey) -> str | None:
        """Have a run's files and tokenizer ready; what is wrong with them, or None."""
        try:
            await self._service.open(key)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    async def use(self, state: State) -> None:
        """Answer by these runs from now on; requests that have begun end with theirs."""
        self._service.use(state)

    async def totals(self) -> tuple[str, Snapshot]:
        """This replica's id and counts."""
        return self.replica_id, take_snapshot(self._service.metrics.registry)

    async def _report(self) -> None:
        """Hand over counts and learn the state, should a call of `use` have been missed."""
        while True:
            await asyncio.sleep(1)
            used, self._backend.used = tuple(self._backend.used), set()
            try:
                _, totals = await self.totals()
                self._service.use(await self._control.report.remote(self.replica_id, totals, self._service.state, used))
            except Exception as error:
                logger.warning("no word from the control: %s", type(error).__name__)


async def _check_binding(settings: Settings) -> None:
    """Refuse to start without keys where others can connect. Raises ValueError, and what Serve raises: then nobody
    knows who could."""
    if settings.api_keys_file is None:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        options = await controller.get_http_config.remote()
        check_binding(options.host or "0.0.0.0", None)


def _value(answer: T | ServiceError) -> T:
    if isinstance(answer, ServiceError):
        raise answer
    return answer
