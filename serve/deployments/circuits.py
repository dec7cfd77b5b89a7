"""The deployment of graphs and interventions: one process with the whole language model, where the service has them.

Jobs live in it, and end with it: whoever asks for one that is gone is told 404. The replicas of `Server` only ask it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from traceback import extract_tb
from typing import Any

from ray import serve as ray_serve

from mtc.errors import one_line
from mtc.results import Ablated
from serve.contract import (
    AblateRequest,
    CircuitMetrics,
    GraphJob,
    GraphRequest,
    RunKey,
    ServiceError,
    Settings,
    Snapshot,
    SteerRequest,
    take_snapshot,
)
from serve.service import Catalogue
from serve.service import Circuits as CircuitService

logger = logging.getLogger("ray.serve")


@ray_serve.deployment(max_ongoing_requests=1024, max_queued_requests=1024, health_check_timeout_s=60)
class Circuits:
    """`serve.service.Circuits`; it is ready when the models of the served run are loaded, or can't be.

    What a client is to be told is returned as a ServiceError, not raised. `deployment` of a call is the one of the
    replica that asks, see `serve.app.build`.
    """

    async def __init__(self, settings: Settings, deployment: str):  # type: ignore[misc]
        _use_threads(settings)
        self._deployment, self._metrics = deployment, CircuitMetrics()
        self._circuits = CircuitService(settings, self._metrics)
        # Of their own: those who wait for their turn on the model must not keep others from asking how far a job is.
        self._passes = ThreadPoolExecutor(settings.max_steerings, thread_name_prefix="steering")
        # One more than may wait, who is told so.
        self._ablating = ThreadPoolExecutor(settings.max_steerings + 1, thread_name_prefix="ablation")
        self.replica_id = ray_serve.get_replica_context().replica_id.unique_id
        try:
            entry, _ = await asyncio.to_thread(Catalogue(settings.run).usable)
            await asyncio.to_thread(self._circuits.open, entry.key)
        except Exception as error:  # it only saves the first who asks a wait, and another run may answer by now
            logger.warning("no models for interventions are loaded before somebody asks: %s", one_line(error))

    async def submit(self, deployment: str, key: RunKey, asked: GraphRequest, owner: str) -> GraphJob | ServiceError:
        return await self._answer(deployment, None, self._circuits.graphs.submit, key, asked, owner)

    async def status(self, deployment: str, job_id: str, owner: str) -> GraphJob | ServiceError:
        return await self._answer(deployment, None, self._circuits.graphs.status, job_id, owner)

    async def result(self, deployment: str, job_id: str, owner: str) -> bytes | ServiceError:
        return await self._answer(deployment, None, self._circuits.graphs.result, job_id, owner)

    async def cancel(self, deployment: str, job_id: str, owner: str) -> ServiceError | None:
        return await self._answer(deployment, None, self._circuits.graphs.cancel, job_id, owner)

    async def steer(
        self, deployment: str, key: RunKey, asked: SteerRequest
    ) -> tuple[str, dict[str, Any]] | ServiceError:
        return await self._answer(deployment, self._passes, self._circuits.steerings.begin, key, asked)

    async def step(self, deployment: str, steered_id: str) -> dict[str, Any] | ServiceError:
        return await self._answer(deployment, self._passes, self._circuits.steerings.step, steered_id)

    async def end(self, deployment: str, steered_id: str) -> ServiceError | None:
        return await self._answer(deployment, None, self._circuits.steerings.end, steered_id)

    async def ablate(self, deployment: str, key: RunKey, asked: AblateRequest) -> Ablated | ServiceError:
        return await self._answer(deployment, self._ablating, self._circuits.ablations.ablate, key, asked)

    def __del__(self) -> None:
        """Called by Serve when it stops the replica."""
        if hasattr(self, "_circuits"):
            self._circuits.close()

    async def totals(self) -> tuple[str, Snapshot]:
        """This replica's id and counts."""
        return self.replica_id, take_snapshot(self._metrics.registry)

    async def _answer(
        self, deployment: str, threads: ThreadPoolExecutor | None, method: Callable[..., Any], *arguments: Any
    ) -> Any:
        if deployment != self._deployment:
            message = "another deployment of the service is taking over, and begins with no graphs"
            return ServiceError(503, "unavailable", message, headers={"Retry-After": "5"})
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, method, *arguments)
        except ServiceError as error:
            return error
        except Exception as error:  # Serve would log its message, which may hold what was sent
            where = " < ".join(f"{at.filename}:{at.lineno} {at.name}" for at in extract_tb(error.__traceback__)[::-1])
            logger.error("%s failed: %s at %s", method.__name__, type(error).__name__, where)
            return ServiceError(500, "internal", "graphs and interventions failed; the service's log has the place")


def _use_threads(settings: Settings) -> None:
    """Ray sets one thread for an actor that reserves less than two CPUs."""
    if settings.interventions_device == "cpu":
        # Not at the top: whoever only deploys the service can do without PyTorch, 2 s and 220 MB.
        import torch

        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(settings.num_threads or max(1, cores // (settings.num_replicas + 1)))
