"""What reads storage does so in threads of its own: storage that hangs takes these, and none that /encode needs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from mtc.storage import StorageError
from serve.contract import ServiceError

T = TypeVar("T")

STORAGE_S = 10.0
"""For which a file of a run, or what a directory of runs holds, is waited for."""
OPEN_S = 120.0
"""For which a run or an analysis is waited for that is not in memory yet: large ones take long to read."""
THREADS, MOST = 8, 64
"""Readings at the same time, and with those that wait for a thread; more are refused at once."""


class StorageReads:
    """Threads that read, for any number of event loops."""

    def __init__(self, threads: int = THREADS, most: int = MOST):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="storage")
        self._most = most
        self._lock = threading.RLock()
        self._unfinished = 0
        self._shared: dict[Hashable, Future[Any]] = {}
        """By key: what is being read for whoever asks for the same."""

    async def read(self, call: Callable[..., T], *arguments: Any, key: Hashable = None, seconds: float) -> T:
        """`call(*arguments)`, once for all who ask for the same `key` while it is read; raises what it does.

        Raises ServiceError 503 after `seconds`, or at once where too many wait; what has begun goes on.
        """
        waiting = asyncio.wrap_future(self._begin(call, arguments, key))
        waiting.add_done_callback(_retrieve)
        done, _ = await asyncio.wait([waiting], timeout=seconds)
        if not done:
            raise _silent(f"has not answered for {seconds:g} s")
        return await waiting

    def _begin(self, call: Callable[..., T], arguments: tuple[Any, ...], key: Hashable) -> Future[T]:
        with self._lock:
            if key is not None and key in self._shared:
                return self._shared[key]
            if self._unfinished >= self._most:
                raise _silent(f"does not answer, and {self._unfinished} requests wait for it")
            self._unfinished += 1
            future = self._threads.submit(call, *arguments)
            if key is not None:
                self._shared[key] = future
        future.add_done_callback(partial(self._end, key))
        return future

    def _end(self, key: Hashable, _: Future[Any]) -> None:
        with self._lock:
            self._unfinished -= 1
            self._shared.pop(key, None)


_READS = StorageReads()
"""Of the whole process."""


async def from_storage(
    call: Callable[..., T], *arguments: Any, key: Hashable = None, seconds: float | None = None
) -> T:
    """As `StorageReads.read`, for a client's request and by default for STORAGE_S. Storage that fails is a ServiceError
    503, too."""
    try:
        return await _READS.read(call, *arguments, key=key, seconds=STORAGE_S if seconds is None else seconds)
    except (OSError, StorageError) as error:
        raise storage_fails(error) from error


def storage_fails(error: Exception) -> ServiceError:
    """503 for an error of the storage."""
    return _silent(f"fails ({type(error).__name__})")


def _silent(what: str) -> ServiceError:
    message = f"the runs' storage {what}; what is in memory is still served"
    return ServiceError(503, "storage", message, headers={"Retry-After": "5"})


def _retrieve(waiting: asyncio.Future[Any]) -> None:
    """Nobody may wait any longer for what went wrong."""
    if not waiting.cancelled():
        waiting.exception()
