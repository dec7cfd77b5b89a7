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

from mtc.errors import MtcError, one_line
from mtc.storage.hub import READ_ONLY, is_hub_url, is_missing, malformed, refusal, unreachable

logger = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds for which storage that fails is asked again, by default."""
LONGEST_PAUSE = 15.0
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the few lines begin that git leaves in the place of a large file which it did not fetch."""


class StorageError(MtcError):
    """A place can't be used: its kind is unknown, a package, credentials or permission is missing; the message names
    it."""


class StorageUnreachable(StorageError):
    """Storage does not answer, or fails; later it may do."""

    exit_code = 1
    event = "failed"


def absolute(url: str) -> str:
    """A local path made absolute (workers run in other directories); a URL as it is.

    Raises StorageError for `~` where there is no home directory: it would be the name of a new one.
    """
    if "://" in url:
        return url
    if (url == "~" or url.startswith("~/")) and home_directory() is None:
        raise StorageError(f"{url}: user {os.geteuid()} has no home directory; set HOME, or give an absolute path")
    return os.path.abspath(os.path.expanduser(url))


def home_directory() -> str | None:
    """The user's home directory, which need not be there; None if neither HOME nor the system's list of users has
    one."""
    home = os.path.expanduser("~")
    return home if os.path.isabs(home) else None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a path or URL, and the path there. Raises StorageError where there is none."""
    if reason := malformed(url):
        raise StorageError(f"{url}: {reason}")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StorageError(f"{url}: {error}") from None
    except ValueError as error:
        raise StorageError(f"{url}: {error}; a directory, s3:// or gs:// is wanted") from None


def patiently(call: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """`call()`, again after growing pauses while it raises, until `patience` seconds are over; then its error.

    That a file is missing or forbidden, or credentials are, is an answer, not a failure: FileNotFoundError,
    PermissionError, or StorageError. StorageUnreachable where the Hugging Face hub does not answer.
    """
    try:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            wait=tenacity.wait_exponential(multiplier=0.25, max=LONGEST_PAUSE),
            stop=tenacity.stop_before_delay(patience),
            before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
            reraise=True,
        )(call)
    except Exception as error:
        if is_missing(error):
            raise FileNotFoundError(one_line(error)) from error
        if reason := refusal(error):
            raise StorageError(reason) from error
        if reason := unreachable(error):
            raise StorageUnreachable(reason) from error
        if "Credentials" not in type(error).__name__:  # of object stores' own
            raise
        raise StorageError(f"the storage asks for credentials: {one_line(error)}") from error


def write_atomic(url: str, data: bytes) -> None:
    """Write a whole file: on local disks through a temporary name, fsync and rename; on object stores by one put.

    Raises StorageError for a repository of the Hugging Face hub.
    """
    if is_hub_url(url):
        raise StorageError(f"{url}: {READ_ONLY}")
    fs, path = filesystem(url)
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


def may_pass(error: BaseException) -> bool:
    """Whether what storage raised may be over later."""
    answers = (FileNotFoundError, NotADirectoryError, PermissionError, TypeError, ValueError, ImportError,
               NotImplementedError, MtcError)  # fmt: skip
    if not isinstance(error, Exception) or isinstance(error, answers) or is_missing(error) or refusal(error):
        return False
    return "Credentials" not in type(error).__name__  # clients of object stores have errors of their own
