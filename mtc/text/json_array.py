"""The elements of a JSON array, which may be larger than memory, parsed one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

BLOCK_CHARS = 2**20
"""Characters that are read at once, at least."""
_SPACE = re.compile(r"[ \t\r\n]*")


def array_elements(file: TextIO, limit: int) -> Iterator[Any]:
    """The values in the array that a file holds.

    Raises ValueError where it is no JSON, where the file is no array, and for an element of more than `limit`
    characters; what came before was given. RecursionError for thousands of brackets.
    """
    return _Reader(file, limit).elements()


class _Reader:
    def __init__(self, file: TextIO, limit: int):
        self._file = file
        self._limit = limit
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        """Characters of the buffer that are done with."""
        self._ended = False

    def elements(self) -> Iterator[Any]:
        if self._mark() != "[":
            raise ValueError("no array")
        mark = self._mark()
        while mark != "]":
            self._at -= 1  # what was looked at begins an element
            yield self._element()
            mark = self._mark()
            if mark not in ("]", ","):
                raise ValueError(f"{mark or 'the end'} after an element")
            if mark == ",":
                mark = self._mark()
                if mark in ("]", ""):
                    raise ValueError(f"{mark or 'the end'} after a comma")
        if after := self._mark():
            raise ValueError(f"{after} after the array")

    def _element(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except ValueError:
                if self._ended:
                    raise
            else:
                if end < len(self._buffer) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            if len(self._buffer) - self._at > self._limit:
                raise ValueError(f"an element is broken, or longer than {self._limit} characters")
            self._more()

    def _mark(self) -> str:
        """The next character that is no white space, passed over; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._buffer):
                self._at += 1
                return self._buffer[self._at - 1]
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        """Read as much as is there again, so that an element that is tried again and again costs twice its size."""
        rest = self._buffer[self._at :]
        block = self._file.read(max(len(rest), BLOCK_CHARS))
        self._buffer, self._at, self._ended = rest + block, 0, not block
