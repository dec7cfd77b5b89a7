"""The models of the runs that are in memory, and the batches of several requests' tokens that pass through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serve.contract import Encoded, Options, ReplicaMetrics, RunKey, ServiceError, Settings
from serve.service.batching import QueueFullError, TokenBatcher
from serve.service.served_run import verified

if TYPE_CHECKING:
    from serve.service.run_encoder import RunEncoder

Windows = Sequence[NDArray[np.int32]]

logger = logging.getLogger("ray.serve")

_LOADERS = ThreadPoolExecutor(4, thread_name_prefix="loading")
"""Of the whole process: a run whose storage hangs takes one of these threads, and none that others need."""


class Models:
    """The language model and the transcoders of each run that was asked for, until it is unloaded."""

    def __init__(self, settings: Settings, metrics: ReplicaMetrics):
        self._settings, self._metrics = settings, metrics
        self._runs: dict[RunKey, asyncio.Future[RunEncoder]] = {}
        self._batcher: TokenBatcher[tuple[RunEncoder, Windows, Options], list[Encoded]] = TokenBatcher(
            self._forward, settings.max_batch_tokens, settings.max_queue_tokens
        )
        metrics.queued.set_function(lambda: self._batcher.queued_tokens)
        metrics.loaded.set_function(lambda: len(self._runs))

    async def load(self, key: RunKey) -> RunEncoder:
        """A run's models, read, checked and warmed up once. Raises what is wrong with it: RunError, OSError, ValueError
        and what PyTorch and transformers raise."""
        task = self._runs.get(key)
        if task is None:
            task = self._runs[key] = asyncio.get_running_loop().run_in_executor(_LOADERS, self._load, key)
            task.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(task)

    def unload(self, key: RunKey) -> None:
        """Let go of a run; batches that wait for it still hold it."""
        self._runs.pop(key, None)

    async def encode_windows(self, key: RunKey, windows: Windows, options: Options) -> list[Encoded]:
        """Features of windows of token ids, each [tokens] int32, by the weights of `key` and no others.

        Raises ServiceError 429 if too many tokens wait.
        """
        encoder = await self.load(key)  # loaded already, unless this replica missed that
        try:
            return await self._batcher.submit(key, sum(map(len, windows)), (encoder, windows, options))
        except QueueFullError as error:
            detail = {"limit": error.limit, "value": error.queued + error.tokens}
            raise ServiceError(429, "overloaded", str(error), detail, {"Retry-After": "1"}) from None

    async def decode_entries(
        self, key: RunKey, layer: int, tokens: int, token: NDArray[np.int64], feature: NDArray[np.int64],
        value: NDArray[np.float32], prefix: int | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """A layer's raw reconstruction, [tokens, d_target] float32, of entries [entries] each."""
        encoder = await self.load(key)
        return await self._batcher.call(encoder.reconstruct, layer, tokens, token, feature, value, prefix)

    def _loaded(self, key: RunKey, task: asyncio.Future[RunEncoder]) -> None:
        failed = task.cancelled() or task.exception() is not None
        self._metrics.loads.labels("failed" if failed else "loaded").inc()
        if failed and self._runs.get(key) is task:
            del self._runs[key]  # so that it can be tried again

    def _load(self, key: RunKey) -> RunEncoder:
        """In a thread, while other runs answer."""
        # Not at the top: whoever only deploys the service can do without PyTorch, 2 s and 220 MB.
        from serve.service.run_encoder import RunEncoder

        encoder = RunEncoder(verified(key), self._settings.device)
        compute = encoder.warm_up(self._settings.max_batch_tokens)
        logger.info("run %s is ready, its language model on %s: %s", key.run_id, self._settings.device, compute)
        return encoder

    def _forward(self, key: Any, requests: list[tuple[RunEncoder, Windows, Options]]) -> list[list[Encoded]]:
        """One batch; in the batcher's thread."""
        encoder = requests[0][0]
        windows = [window for _, many, _ in requests for window in many]
        options = [each for _, many, each in requests for _ in many]
        start = time.perf_counter()
        found = iter(encoder.encode_batch(windows, options))
        answers = [[next(found) for _ in many] for _, many, _ in requests]
        self._metrics.forward.observe(time.perf_counter() - start)
        self._metrics.batch_tokens.observe(sum(map(len, windows)))
        return answers
