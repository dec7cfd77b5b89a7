"""Where the programs lie, the packages `jobs`, `cluster` and `serve`, and under what name one was started.

In a source tree they are its top-level packages. The wheel has them below `mtc/_programs`, where they are in nobody's
way: other packages may well be called `cluster` or `serve`. `mtc` puts that folder first for its own process and for
those of Ray.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

INSTALLED = Path(__file__).absolute().with_name("_programs")
"""The folder in the wheel."""
PATH = "PYTHONPATH"
PREFIX = "mtc "
"""How the name of a program begins that `mtc` started."""


def directory() -> str:
    """The folder that `jobs`, `cluster` and `serve` are imported from."""
    return str(INSTALLED if INSTALLED.is_dir() else INSTALLED.parents[1])


def put_first() -> None:
    """Have this process, and those that it starts, a Ray among them, find the programs before others of their names."""
    sys.path.insert(0, directory())
    os.environ[PATH] = _search_path()


def exported() -> dict[str, str]:
    """What must be in the environment of a Ray that is to run the wheel's programs; nothing for those of a source
    tree."""
    return {PATH: _search_path()} if INSTALLED.is_dir() else {}


def runtime_env() -> dict[str, dict[str, str]]:
    """Ray's runtime environment in which workers of a cluster that is joined find the wheel's programs, where each node
    has them at the same place. Empty for those of a source tree, and where the job has a PYTHONPATH of its own."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    if not INSTALLED.is_dir() or PATH in (job.get("env_vars") or {}):
        return {}
    return {"env_vars": {PATH: f"{directory()}{os.pathsep}${{{PATH}}}"}}  # Ray puts the node's in its place


def program_name(otherwise: str) -> str:
    """What the running program is called in its help and its messages: `mtc COMMAND`, or `otherwise`."""
    return sys.argv[0] if sys.argv[0].startswith(PREFIX) else otherwise


def described(text: str | None) -> str:
    """A program's description, in which commands are those of `mtc` if that started it."""
    if not program_name(""):
        return text or ""
    return re.sub(r"python (?:jobs/(\w+)\.py|-m (?:jobs|serve)\.(\w+))", _command, text or "")


def _search_path() -> str:
    known = os.environ.get(PATH, "").split(os.pathsep)
    return os.pathsep.join([directory(), *(path for path in known if path and path != directory())])


def _command(match: re.Match[str]) -> str:
    found = match[1] or match[2]
    return PREFIX + {"app": "serve"}.get(found, found)
