"""A trainer's wall time, split into parts that exclude each other, so that they add up.

The model actors' time is counted beside it: where both have their own hardware they work at the same time, and the
larger of the two decides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mtc.results import PARTS


class Clock:
    """Seconds of this process's wall time by part of PARTS; a part inside another is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._stack = ["other"]
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def move(self, start: str, end: str, seconds: float) -> None:
        """Count `seconds` that were spent inside part `start` as `end`."""
        seconds = min(seconds, self.seconds[start])  # a device's spans may overlap its own work
        self.seconds[start] -= seconds
        self.seconds[end] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by part, up to now."""
        self._settle()
        return dict(self.seconds)

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    def _settle(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
