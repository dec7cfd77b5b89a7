"""Aliases: names such as `production` beside the runs, each of a run that a person chose.

    <root>/aliases/<name>.json         Alias
                   <name>.json.copy    the same, read for the history where the record is damaged

`<root>/latest` follows what is published; an alias moves by a promotion alone. On a disk each move is made under a lock
of all processes, which NFS has too. Object stores have none: there the record is read again just before it is written,
and of two moves in the same moment the later one holds and the earlier one's line of the history is lost.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from pydantic import Field, ValidationError

from mtc.errors import one_line
from mtc.record import Record
from mtc.results import Figures, Gate
from mtc.storage.files import StorageError, StorageUnreachable
from mtc.storage.hub import is_hub_url
from mtc.storage.locks import locked
from mtc.storage.runs import RunDirectory, RunError

logger = logging.getLogger(__name__)
ALIASES, TOKENS = "aliases", "tokens"
"""Directories beside the runs: of the aliases, and of token stores where output.root is a URL."""
TAKEN = ("latest", ALIASES, TOKENS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RUN = "^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?$"


class Move(Record):
    """One line of an alias's history."""

    run_id: str = Field(pattern=_RUN)
    """The run that got the name."""
    when: str
    """ISO 8601, UTC."""
    what: Literal["promoted", "rolled back"]
    """Whether the run was chosen, or taken back to."""
    figures: dict[str, Figures] = {}
    """The run's figures then, by the name of each of its transcoders; none where they were not read."""
    by: str | None = None
    """Who moved it, if that was said."""
    note: str | None = None
    """Why, if that was said."""


class Alias(Record):
    """One name, and what it named before."""

    run_id: str = Field(pattern=_RUN)
    """The run that has the name now: a directory beside `aliases`, or one transcoder of several, `<run id>/layer9`."""
    history: tuple[Move, ...] = ()
    """All moves, the newest last."""
    gate: Gate | None = None
    """What a run is held to that is promoted without a gate of its own."""

    def before(self) -> list[str]:
        """The runs that had the name before, the one to go back to first; what was taken back is not among them."""
        stack: list[str] = []
        for move in self.history:
            if move.what == "rolled back" and move.run_id in stack:
                while stack[-1] != move.run_id:
                    stack.pop()
            elif stack[-1:] != [move.run_id]:
                stack.append(move.run_id)
        return [run_id for run_id in dict.fromkeys(reversed(stack)) if run_id != self.run_id]


def is_name(name: str) -> bool:
    """Whether an alias can have this name, by its form: that of a run's id."""
    return bool(_NAME.fullmatch(name)) and name not in TAKEN


def read_aliases(root: str) -> dict[str, Alias]:
    """What each alias of a directory of runs names, as `last_known`."""
    directory = RunDirectory(posixpath.join(root, ALIASES))
    names = sorted(name.removesuffix(".json") for name in directory.names() if name.endswith(".json"))
    found = {name: last_known(root, name) for name in names}
    return {name: alias for name, alias in found.items() if alias is not None}


def read_alias(root: str, name: str) -> Alias | None:
    """What one alias names; None if there is none. Raises RunError if it can't be read."""
    directory = RunDirectory(posixpath.join(root, ALIASES))
    content = _read(directory, f"{name}.json")
    return None if content is None else _parse(directory, f"{name}.json", content)


def last_known(root: str, name: str) -> Alias | None:
    """As `read_alias`, by the copy where the record is damaged; raises RunError if there is none that can be read."""
    try:
        return read_alias(root, name)
    except RunError as damaged:
        directory = RunDirectory(posixpath.join(root, ALIASES))
        content = _read(directory, f"{name}.json.copy")
        if content is None:
            raise
        logger.warning("%s; its copy has the history", damaged)
        return _parse(directory, f"{name}.json.copy", content)


def move_alias(root: str, name: str, decide: Callable[[Alias | None], Alias]) -> Alias:
    """Let an alias be what `decide` makes of what it was; returns that.

    Raises what `decide` does, and RunError for a name that no alias can have, a place where none can be kept, or
    another move meanwhile.
    """
    require_alias_name(root, name)
    directory = RunDirectory(posixpath.join(root, ALIASES))
    with _exclusively(directory, name):
        before = _read(directory, f"{name}.json")
        after = decide(last_known(root, name))
        if _read(directory, f"{name}.json") != before:
            raise RunError(f"{directory.location(name)}.json was moved by another promotion meanwhile: begin again")
        _write(directory, name, after)
    return after


def take_back(root: str, name: str, moved: Alias, before: Alias | None) -> None:
    """Let an alias be again what it was before a move, unless another one has followed."""
    directory = RunDirectory(posixpath.join(root, ALIASES))
    with _exclusively(directory, name):
        if last_known(root, name) != moved:
            return
        if before:
            return _write(directory, name, before)
        for file in (f"{name}.json", f"{name}.json.copy"):
            with suppress(FileNotFoundError):
                directory.remove(file)


def require_alias_name(root: str, name: str) -> None:
    """Raises RunError where no alias of this name can be."""
    if is_hub_url(root):
        raise RunError(f"{root}: a repository of the Hugging Face hub holds one run, and no aliases")
    if not is_name(name):
        raise RunError(
            f"{name[:200]!r} can't be an alias: letters, digits, '.', '_' and '-' are wanted, the first a letter or a "
            f"digit, 100 at most, and none of {', '.join(TAKEN)}"
        )
    if (taken := RunDirectory(posixpath.join(root, name))).exists():
        raise RunError(f"{name!r} can't be an alias: {taken.url} is there, and would be taken for what is meant")


def require_run_name(run: RunDirectory) -> None:
    """Raises RunError where a new run would have the name of an alias, or one that means something else."""
    root, name = posixpath.split(run.url.rstrip("/"))
    if name in TAKEN:
        raise RunError(f"output.run_id={name}: {root}/{name} has a meaning of its own; give another output.run_id")
    if RunDirectory(posixpath.join(root, ALIASES)).exists(f"{name}.json"):
        raise RunError(f"output.run_id={name}: {root} has an alias of that name; give another output.run_id")


@contextmanager
def _exclusively(directory: RunDirectory, name: str) -> Iterator[None]:
    try:
        if "://" in directory.url and not directory.url.startswith("file://"):
            yield
            return
        os.makedirs(directory.path, exist_ok=True)
        with locked(os.path.join(directory.path, name)):
            yield
    except (StorageError, OSError) as error:
        refused = isinstance(error, StorageError) and not isinstance(error, StorageUnreachable)
        if refused or isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise RunError(f"{directory.url}: aliases can't be kept there: {error}") from error
        raise


def _write(directory: RunDirectory, name: str, alias: Alias) -> None:
    content = alias.model_dump_json(indent=1)
    directory.write(f"{name}.json", content)
    try:
        directory.write(f"{name}.json.copy", content)
    except Exception as error:  # of the storage: the alias has moved
        logger.warning("%s.json.copy could not be written: %s", directory.location(name), one_line(error))


def _read(directory: RunDirectory, name: str) -> bytes | None:
    directory.fs.invalidate_cache()  # others write here too
    try:
        return directory.read(name)
    except (RunError, NotADirectoryError):
        return None


def _parse(directory: RunDirectory, name: str, content: bytes) -> Alias:
    try:
        return Alias.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{directory.location(name)} is no alias that can be read ({f'{where}: ' * bool(where)}{first['msg']}): "
            "promote a run again"
        ) from None
