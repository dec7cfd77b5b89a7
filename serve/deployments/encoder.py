"""The deployment that holds the models: batches of several requests' tokens, for one or several runs."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from mtc.storage import RunDirectory, RunError
from serve.contract import Encoded, EncoderMetrics, Options, RunKey, ServiceError, Settings, Snapshot, take_snapshot
from serve.service import WEIGHTS, QueueFullError, TokenBatcher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from serve.service import RunEncoder

    Windows = list[NDArray[np.int32]]

logger = logging.getLogger("ray.serve")


# Calls wait in the batcher, which knows their tokens, and not in Serve's own queues, which count requests.
@ray_serve.deployment(max_ongoing_requests=1024, max_queued_requests=256, health_check_timeout_s=60)
class Encoder:
    """A replica. What a client is to be told is returned as a ServiceError: Serve logs what is raised as its fault."""

    async def __init__(self, settings: Settings, control: DeploymentHandle):  # type: ignore[misc]
        self._settings, self._control = settings, control
        self._metrics = EncoderMetrics()
        self._runs: dict[RunKey, asyncio.Task[RunEncoder]] = {}
        self._batcher: TokenBatcher[tuple[RunEncoder, Windows, Options], list[Encoded]] = TokenBatcher(
            self._forward, settings.max_batch_tokens, settings.max_queue_tokens
        )
        self._metrics.queued.set_function(lambda: self._batcher.queued_tokens)
        self._metrics.loaded.set_function(lambda: len(self._runs))
        self.replica_id = ray_serve.get_replica_context().replica_id.unique_id
        self._use_threads()
        state = await control.state.remote()
        for key in (state.current, *state.loaded):  # a replica that can't answer must not become healthy
            await self._run(key)
        await control.encoder_is_ready.remote()
        self._reporter = asyncio.create_task(self._report())

    async def encode(self, key: RunKey, windows: Windows, options: Options) -> list[Encoded] | ServiceError:
        """Features of windows of token ids, each [tokens] int32."""
        encoder = await self._run(key)  # loaded already, unless this replica missed that
        try:
            return await self._batcher.submit(key, sum(map(len, windows)), (encoder, windows, options))
        except QueueFullError as error:
            detail = {"limit": error.limit, "value": error.queued + error.tokens}
            return ServiceError(429, "overloaded", str(error), detail, {"Retry-After": "1"})

    async def decode(
        self, key: RunKey, tokens: int, token: NDArray[np.int64], feature: NDArray[np.int64],
        value: NDArray[np.float32], prefix: int | None,
    ) -> Any:  # fmt: skip
        """Raw reconstruction, [tokens, d_target] float32."""
        encoder = await self._run(key)
        return await self._batcher.call(encoder.decode, tokens, token, feature, value, prefix)  # type: ignore[arg-type]

    async def load(self, key: RunKey) -> str | None:
        """Have a run ready; what is wrong with it, or None."""
        try:
            await self._run(key)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    async def unload(self, key: RunKey) -> None:
        """Let go of a run; batches that wait for it still hold it."""
        self._runs.pop(key, None)

    async def totals(self) -> tuple[str, Snapshot]:
        """This replica's id and counts."""
        return self.replica_id, take_snapshot(self._metrics.registry)

    async def _run(self, key: RunKey) -> RunEncoder:
        task = self._runs.get(key)
        if task is None:
            task = self._runs[key] = asyncio.create_task(asyncio.to_thread(self._load, key))
            task.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(task)

    def _loaded(self, key: RunKey, task: asyncio.Task[RunEncoder]) -> None:
        failed = task.cancelled() or task.exception() is not None
        self._metrics.loads.labels("failed" if failed else "loaded").inc()
        if failed and self._runs.get(key) is task:
            del self._runs[key]  # so that it can be tried again

    def _load(self, key: RunKey) -> RunEncoder:
        """Read, check and warm up; in a thread, while other runs answer."""
        # Not at the top: the process that deploys imports this module and can do without PyTorch, 2 s and 220 MB.
        from serve.service import RunEncoder

        run = RunDirectory(key.url, key.run_id)
        manifest = run.verify(["config.yaml", WEIGHTS])
        if (found := manifest.files[WEIGHTS].sha256) != key.sha256:
            raise RunError(f"{run.url}: {WEIGHTS} has the sha256 {found}, {key.sha256} was asked for")
        encoder = RunEncoder(run, self._settings.device)
        compute = encoder.warm_up(self._settings.max_batch_tokens)
        logger.info("run %s is ready, its language model on %s: %s", key.run_id, self._settings.device, compute)
        return encoder

    def _forward(self, key: Any, requests: list[tuple[RunEncoder, Windows, Options]]) -> list[list[Encoded]]:
        """One batch; in the batcher's thread."""
        encoder = requests[0][0]
        windows = [window for _, many, _ in requests for window in many]
        options = [each for _, many, each in requests for _ in many]
        start = time.perf_counter()
        found = iter(encoder.encode(windows, options))
        answers = [[next(found) for _ in many] for _, many, _ in requests]
        self._metrics.forward.observe(time.perf_counter() - start)
        self._metrics.batch_tokens.observe(sum(map(len, windows)))
        return answers

    def _use_threads(self) -> None:
        import torch  # not at the top, see _load

        if self._settings.device == "cpu":
            # Ray sets one thread for an actor that reserves less than two CPUs.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(self._settings.num_threads_encoder or max(1, cores // self._settings.num_replicas))

    async def _report(self) -> None:
        """Leave the counts where they outlive this replica."""
        last: Snapshot = ()
        while True:
            await asyncio.sleep(1)
            found = take_snapshot(self._metrics.registry)
            if found != last:
                try:
                    await self._control.keep_totals.remote(self.replica_id, found)
                    last = found
                except Exception as error:
                    logger.warning("counts were not handed over: %s", type(error).__name__)
