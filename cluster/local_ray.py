"""Where a Ray of one's own can run: what its processes can't do with, said before they fail one by one."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from mtc.config import ConfigError
from mtc.errors import MtcError, one_line

LONGEST_ROOT = 25
"""Longest path, in bytes, in which Ray can make its sockets, in the user's directory there: theirs have 107 at most."""
LONGEST_PROXY_ROOT = 14
"""Longest path, in bytes, for a Ray that serves: HAProxy's sockets lie deeper, ROOT/mtc-xxxxxxxx/NODE
ID/admin.sock.PROCESS ID.tmp."""


class LocalRayError(MtcError):
    """A Ray of one's own did not start, such as within the 30 s that it gives itself; it may the next time."""

    exit_code = 1
    event = "failed"


@contextmanager
def starting() -> Iterator[None]:
    """A context for what starts a Ray of one's own. Raises LocalRayError for whatever Ray raises."""
    try:
        yield
    except Exception as error:
        raise LocalRayError(
            f"a Ray of this process's own did not start: {one_line(error)}; what its parts say is in "
            f"{session_directory()}/session_latest/logs"
        ) from error


def check_installation() -> None:
    """Raises ConfigError if Ray cannot start from this environment: it preloads a library by its path, in a list that
    whitespace separates."""
    if re.search(r"\s", sys.prefix):
        raise ConfigError(
            f"Ray cannot start from a Python environment whose path holds whitespace: {sys.prefix}; "
            "make one elsewhere (python3 -m venv) and install there"
        )


def temporary_root(longest: int = LONGEST_ROOT) -> str:
    """The directory for Ray's temporary one: RAY_TMPDIR's or TMPDIR's if sockets can lie there (`longest` bytes, ASCII,
    no whitespace), else /tmp. Raises ConfigError if nothing can be written there."""
    wanted = [os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    for root in [*wanted, "/tmp"]:
        if re.fullmatch(rf"/[!-~]{{0,{longest - 1}}}", root) and os.access(root, os.W_OK | os.X_OK):
            return root
    raise ConfigError(
        f"Ray's sockets can lie neither in {', '.join(wanted) or 'TMPDIR (not set)'} nor in /tmp: give in RAY_TMPDIR a "
        f"directory that can be written, whose path has at most {longest} ASCII letters and no whitespace"
    )


def session_directory() -> str:
    """Where this user's local Rays keep their sessions: not Ray's usual /tmp/ray, which is whoever's came first.
    Raises ConfigError if it is another user's."""
    path = f"{temporary_root()}/ray-{os.getuid()}"
    if os.path.lexists(path) and (os.path.islink(path) or os.lstat(path).st_uid != os.getuid()):
        raise ConfigError(f"{path} is not user {os.getuid()}'s own directory: give another place in RAY_TMPDIR")
    return path


def make_temporary_directory() -> str:
    """A new temporary directory for a Ray that serves, with room for HAProxy's sockets (`serve.contract.proxy_files`).
    Raises ConfigError."""
    return tempfile.mkdtemp(prefix="mtc-", dir=temporary_root(LONGEST_PROXY_ROOT))
