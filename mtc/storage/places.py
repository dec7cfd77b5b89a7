"""Places that the user names or has: whether they can be used, said before any work; and where caches go."""

from __future__ import annotations

import os
import re
import uuid

from mtc.errors import one_line
from mtc.storage.files import (
    StorageError,
    StorageUnreachable,
    absolute,
    filesystem,
    home_directory,
    may_pass,
    patiently,
)
from mtc.storage.hub import READ_ONLY, is_hub_url

PROBE_SECONDS = 15.0
"""For which storage is asked again before it counts as out of reach."""


def check_writable(what: str, url: str) -> None:
    """Raises StorageError if nothing can be written below a directory or URL, which need not be there yet; `what` is
    how messages begin. Leaves nothing behind."""
    if is_hub_url(url):
        raise StorageError(f"{what}: {READ_ONLY}")
    if "://" in url and not url.startswith("file://"):
        return _check_remote(what, url)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", url) and not url.startswith("file://"):
        raise StorageError(f"{what}: two slashes are wanted behind the colon")
    path = absolute(url.removeprefix("file://"))
    if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise StorageError(f"{what}: a name in it is longer than the 255 bytes of file systems")
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise StorageError(f"{what}: {path} is there and is no directory")
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise StorageError(f"{what}: {path} is on a read-only file system")
    if not os.access(path, os.W_OK | os.X_OK):
        raise StorageError(f"{what}: user {os.geteuid()} may not write in {path}")


def cache_directory() -> str:
    """`$MTC_CACHE`, or `mtc` in the user's cache directory: converted models and token stores. An absolute path.

    Raises StorageError for a user who has neither.
    """
    if named := os.environ.get("MTC_CACHE"):
        return absolute(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else ""  # relative ones are to be ignored, says its specification
    if not base and home_directory() is None:
        raise StorageError(f"{_homeless()}: set MTC_CACHE to a directory that it may write, for caches")
    return os.path.join(base or absolute("~/.cache"), "mtc")


def prepare_environment() -> None:
    """Check the cache directory before a job starts. It takes the place of a home directory that is not there, as in
    many containers: Ray, and what it starts, can't do without one. Libraries' caches go there too if the home directory
    can't be written.

    Raises StorageError.
    """
    cache, home = cache_directory(), home_directory()
    named = os.environ.get("MTC_CACHE")
    what = f"MTC_CACHE={named}" if named else f"MTC_CACHE is not set and the cache directory is {cache}"
    check_writable(what, cache)
    os.environ["MTC_CACHE"] = cache  # processes that are started elsewhere find it too
    if home is None or not os.path.isdir(home):
        os.environ["HOME"] = cache
    elif not os.access(home, os.W_OK | os.X_OK):
        os.environ.setdefault("XDG_CACHE_HOME", cache)
        os.environ.setdefault("MPLCONFIGDIR", os.path.join(cache, "matplotlib"))


def _homeless() -> str:
    return f"user {os.geteuid()} has no home directory (HOME is not set)"


def _check_remote(what: str, url: str) -> None:
    try:
        fs, path = filesystem(url)
        probe = f"{path.rstrip('/')}/.writable-{uuid.uuid4().hex[:8]}"
        patiently(lambda: fs.pipe_file(probe, b""), PROBE_SECONDS)
        patiently(lambda: fs.rm_file(probe), PROBE_SECONDS)
    except StorageError as error:
        raise StorageError(f"{what}: {str(error).removeprefix(f'{url}: ')}") from None
    except Exception as error:  # each client of object stores has errors of its own
        kind = StorageUnreachable if may_pass(error) else StorageError
        raise kind(f"{what}: it can't be written: {one_line(error)}") from None
