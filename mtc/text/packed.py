"""Packed files as streams of bytes, read to the end of the last member and no further than they are sound."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

BLOCK_BYTES = 2**17
XZ_BYTES = 2**29
"""Most memory that unpacking .xz may take; the largest preset of xz takes an eighth."""
DAMAGE = (pa.ArrowException, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
"""What damaged files raise, besides OSError without a number."""


def unpacked(raw: BinaryIO, packing: str | None) -> io.BufferedReader:
    """What gzip, zstd, bz2 or xz packed, of all members if there are several; the bytes of `raw` for None.

    Reading raises one of DAMAGE, or OSError without a number, where the file is cut or damaged.
    """
    stream: Any = raw
    if packing == "gzip":
        stream = gzip.GzipFile(fileobj=raw)
    elif packing == "zstd":
        stream = pa.CompressedInputStream(raw, packing)
    elif packing == "bz2":
        stream = _Members(raw, bz2.BZ2Decompressor)
    elif packing == "xz":
        stream = _Members(raw, lambda: lzma.LZMADecompressor(memlimit=XZ_BYTES))
    return io.BufferedReader(stream)  # a read that meets damage loses what it has: let it be little


class _Members(io.RawIOBase):
    """Members one after the other. The standard library's own readers take one whose head is damaged for the end of the
    file, and Arrow's fails on an empty one."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]):
        self._raw = raw
        self._new = new
        self._member: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = b""
        while not data:
            if self._member is None or self._member.eof:
                block = self._member.unused_data if self._member else b""
                while not (block := block.lstrip(b"\0")):  # xz pads with zeros
                    if not (block := self._raw.read(BLOCK_BYTES)):
                        return 0
                self._member = self._new()
            elif self._member.needs_input:
                if not (block := self._raw.read(BLOCK_BYTES)):
                    raise EOFError("the file ends in the middle")
            else:
                block = b""
            data = self._member.decompress(block, len(target))
        target[: len(data)] = data
        return len(data)
