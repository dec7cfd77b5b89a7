"""One process of a machine at a time, for what is made once in the cache directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from mtc.errors import MtcError

logger = logging.getLogger(__name__)

SAY_SECONDS = 10.0
LOCK_SECONDS = 3600.0
"""Longest wait for a process that makes the same; a large model may be downloading."""


class LockError(MtcError):
    """Another process has been making the same for LOCK_SECONDS."""

    exit_code = 1
    event = "failed"


@contextmanager
def locked(target: str | os.PathLike[str]) -> Iterator[None]:
    """A context for making `target`, in which no other process of this machine is; a dead one holds nothing up.

    Raises LockError.
    """
    lock = FileLock(f"{os.fspath(target)}.lock")
    try:
        lock.acquire(timeout=min(SAY_SECONDS, LOCK_SECONDS))
    except Timeout:
        logger.warning("another process makes %s; waiting for it, at most %.0f s", target, LOCK_SECONDS)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise LockError(
                f"another process of this machine holds {lock.lock_file} for {LOCK_SECONDS:.0f} s; end it, or use "
                "another MTC_CACHE"
            ) from None
    try:
        yield
    finally:
        lock.release()
