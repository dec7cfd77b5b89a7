"""Dynamic batching by tokens: whatever waits when the device is free goes next, as much as fits one forward pass.

No timer: a request that comes alone runs at once, and while a batch runs the next one collects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")


class QueueFullError(RuntimeError):
    """More tokens would wait than may."""

    def __init__(self, tokens: int, queued: int, limit: int):
        super().__init__(tokens, queued, limit)
        self.tokens, self.queued, self.limit = tokens, queued, limit

    def __str__(self) -> str:
        return f"{self.tokens} tokens beside {self.queued} that wait are more than max_queue_tokens={self.limit}"


@dataclass(eq=False, frozen=True)  # two are never equal: payloads may be arrays
class _Item:
    key: Hashable
    tokens: int
    payload: object
    answer: asyncio.Future[object]


class TokenBatcher(Generic[P, R]):
    """Calls `run` in a thread of its own with the payloads of a batch, which all have the same key.

    Args:
        run: gets the key and a batch's payloads, returns an answer for each. A batch that it raises for is run again in
            halves, so that what one payload does wrong is its own affair.
        max_batch_tokens: most tokens of a batch; an item that has more is a batch of its own.
        max_queue_tokens: most tokens that wait, those in the running batch left out.
    """

    def __init__(self, run: Callable[[Hashable, list[P]], Sequence[R]], max_batch_tokens: int, max_queue_tokens: int):
        self._run, self._max_batch, self._max_queue = run, max_batch_tokens, max_queue_tokens
        self._waiting: deque[_Item] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for a batch."""
        return sum(item.tokens for item in self._waiting)

    async def submit(self, key: Hashable, tokens: int, payload: P) -> R:
        """The answer to a payload of so many tokens; whoever is cancelled while it waits costs no forward pass.

        Raises QueueFullError at once if too many tokens wait already, but never for lack of room in an empty queue.
        """
        queued = self.queued_tokens
        if queued and queued + tokens > self._max_queue:
            raise QueueFullError(tokens, queued, self._max_queue)
        item = _Item(key, tokens, payload, asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await item.answer  # type: ignore[return-value]
        finally:
            if item in self._waiting:
                self._waiting.remove(item)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something else between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _work(self) -> None:
        while batch := self._take():
            await self._answer(batch)

    async def _answer(self, batch: list[_Item]) -> None:
        """An answer or an error for each item, after about two failures of each size at the most: enough to find two
        bad ones, while a lost device or a lack of memory does not keep everybody waiting."""
        parts, failures = [batch], 2 * len(batch).bit_length()
        while parts:
            part = [item for item in parts.pop() if not item.answer.done()]  # others were cancelled meanwhile
            if not part:
                continue
            try:
                payloads: list[P] = [item.payload for item in part]  # type: ignore[misc]
                answers = await self.call(self._run, part[0].key, payloads)
            except Exception as error:
                failures -= 1
                if len(part) > 1 and failures > 0:
                    half = len(part) // 2
                    parts += [part[half:], part[:half]]
                    continue
                for item in part:
                    if not item.answer.done():
                        item.answer.set_exception(error)
            else:
                for item, answer in zip(part, answers, strict=True):
                    if not item.answer.done():
                        item.answer.set_result(answer)

    def _take(self) -> list[_Item]:
        """The oldest item and, in order, all others of its key that fit beside it."""
        batch: list[_Item] = []
        tokens, left = 0, deque[_Item]()
        for item in self._waiting:
            fits = not batch or (item.key == batch[0].key and tokens + item.tokens <= self._max_batch)
            (batch if fits else left).append(item)
            tokens += item.tokens if fits else 0
        self._waiting = left
        return batch
