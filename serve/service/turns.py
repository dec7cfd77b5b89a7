"""Turns of several threads on one model, in the order in which they asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that is fair: whoever asks first has it first, also before a thread that gives it up and asks again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._served = 0, 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, no other thread has its turn."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def let_others(self) -> None:
        """Within a turn: whoever waits comes first, then this thread goes on."""
        with self._changed:
            if self._next == self._served + 1:
                return  # nobody waits
        self._give()
        self._take()

    def _take(self) -> None:
        with self._changed:
            number, self._next = self._next, self._next + 1
            while self._served != number:
                self._changed.wait()

    def _give(self) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()
