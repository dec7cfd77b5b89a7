"""Files on local disks and object stores: written whole, read patiently."""

from __future__ import annotations

import logging
import os
import posixpath
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
import tenacity

logger = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds for which storage that fails is asked again, by default."""
LONGEST_PAUSE = 15.0


def absolute(url: str) -> str:
    """A local path made absolute (workers run in other directories); a URL as it is."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def patiently(call: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """`call()`, again after growing pauses while it raises, until `patience` seconds are over; then its error.

    That a file is missing or forbidden, or credentials are, is an answer, not a failure.
    """
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_exponential(multiplier=0.25, max=LONGEST_PAUSE),
        stop=tenacity.stop_before_delay(patience),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )(call)


def write_atomic(url: str, data: bytes) -> None:
    """Write a whole file: on local disks through a temporary name, fsync and rename; on object stores by one put."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    if "://" in url and not url.startswith("file://"):
        fs.pipe_file(path, data)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)  # the name must survive a power cut as well
        finally:
            os.close(folder)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def cache_directory() -> str:
    """`$MTC_CACHE`, or `mtc` in the user's cache directory: converted models and token stores."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("MTC_CACHE") or os.path.join(base, "mtc")


def _may_pass(error: BaseException) -> bool:
    answers = (FileNotFoundError, NotADirectoryError, PermissionError, TypeError, ValueError, ImportError)
    # Clients of object stores have errors of their own.
    return isinstance(error, Exception) and not isinstance(error, answers) and "Credentials" not in type(error).__name__
