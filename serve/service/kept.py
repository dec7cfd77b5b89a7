"""What is kept in memory of what was read from the storage, so that it is not read twice."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

FILES_BYTES = 64 << 20
"""Of report files in a process: some hundred reports of one layer."""


class Tables(Generic[T]):
    """What `open_one` makes of a number, the `most` that were used last, each made once whoever asks at the same time;
    for any number of threads."""

    def __init__(self, open_one: Callable[[int], T], most: int):
        self._open, self._most = open_one, most
        self._lock = threading.Lock()
        self._opening: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._kept: OrderedDict[int, T] = OrderedDict()

    def known(self, number: int) -> T | None:
        """The one that is in memory; None if it is not."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            return self._kept.get(number)

    def __call__(self, number: int) -> T:
        with self._lock:
            opening = self._opening[number]
        with opening:
            found = self.known(number)
            if found is not None:
                return found
            found = self._open(number)
            with self._lock:
                self._kept[number] = found
                while len(self._kept) > self._most:
                    self._kept.popitem(last=False)
            return found


class Files:
    """Contents of files by their digest, those that were used last, `most_bytes` in all; for any number of threads."""

    def __init__(self, most_bytes: int = FILES_BYTES):
        self._most, self._bytes = most_bytes, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, sha256: str) -> bytes | None:
        """The file's content; None if it is not in memory."""
        with self._lock:
            if sha256 in self._kept:
                self._kept.move_to_end(sha256)
            return self._kept.get(sha256)

    def put(self, sha256: str, content: bytes) -> None:
        """Keep a file's content; one that alone is too large is not kept."""
        with self._lock:
            if sha256 in self._kept or len(content) > self._most:
                return
            self._kept[sha256] = content
            self._bytes += len(content)
            while self._bytes > self._most:
                self._bytes -= len(self._kept.popitem(last=False)[1])


REPORT_FILES = Files()
