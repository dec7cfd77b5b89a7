"""Notes and stars that people give features while they look at a run, kept beside its files.

    <run>/notes/<feature>.json   {"note", "star", "changed"}, mtc.results.FeatureNote, written anew with each change
    <run>/notes.json             {"<feature>": {...}, ...}: all of them, as exports and the browser write them

A file for each feature, because writers of different features then never meet, on any storage. Two of one feature
meet: on a disk each change is made under a lock of all processes, which NFS has too; on object stores, which have
none, the last write wins. Neither is in the manifest, so that a note never makes a run another one. A feature that lost
note and star keeps its file, which outweighs notes.json.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

from mtc.errors import one_line
from mtc.results import FeatureNote
from mtc.storage.files import StorageError, StorageUnreachable, patiently
from mtc.storage.hub import READ_ONLY, is_hub_url
from mtc.storage.locks import locked
from mtc.storage.runs import NOTES, NOTES_FILE, RunDirectory

logger = logging.getLogger(__name__)

NOTES_PATIENCE = 5.0
"""Seconds for which storage that fails is asked again: somebody waits for a page."""
MOST_BYTES, MOST_BYTES_OF_ONE = 1 << 24, 1 << 16
"""Of notes.json, enough for 20,000 of the longest notes, and of one feature's file; larger ones are not parsed."""
_ALL = TypeAdapter(dict[int, FeatureNote])
_OLDEST = datetime.min.replace(year=2, tzinfo=UTC)
Listed = dict[str, Any]


class NotesReadOnly(StorageError):
    """Notes can't be kept beside a run; the message says where and why."""


class Notes:
    """The notes of one transcoder's features, for any number of threads; files that changed are read again."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._local = "://" not in run.url or run.url.startswith("file://")
        self._lock = threading.Lock()
        self._files: dict[str, tuple[Listed | None, dict[int, FeatureNote]]] = {}
        """By path: what the storage said of the file, None of one that was written here since, and what is in it."""
        self._merged: dict[int, FeatureNote] = {}
        self._was_read = False
        self.known: Mapping[int, FeatureNote] = MappingProxyType({})
        """Those features that have a note or a star, as they were last read or written here; asks no storage."""

    def read(self) -> Mapping[int, FeatureNote]:
        """Those features that have a note or a star. Raises the storage's error if it fails for NOTES_PATIENCE
        seconds; waits for storage that hangs."""
        with self._lock:
            self._refresh()
            return self.known

    def update(self, feature: int, edit: Callable[[FeatureNote], FeatureNote]) -> FeatureNote:
        """Replace what is kept of a feature by what `edit` makes of it; returns that, with a time later than before.

        Raises what `edit` does, NotesReadOnly where nothing can be written, and the storage's error if it fails for
        NOTES_PATIENCE seconds.
        """
        with self._lock, self._exclusively():
            self._refresh()
            before = self._merged.get(feature, FeatureNote())
            # The same time twice would hide a change from whoever has seen the first: clocks go wrong.
            now = max(datetime.now(UTC), _when(before.changed) + timedelta(microseconds=1))
            after = edit(before).model_copy(update={"changed": now.isoformat(timespec="microseconds")})
            name = f"{NOTES}/{feature}.json"
            self._run.write(name, after.model_dump_json(), NOTES_PATIENCE)
            self._files[posixpath.join(self._run.path, name)] = None, {feature: after}
            self._merge()
            return after

    @property
    def writable(self) -> bool:
        """Whether notes can be kept, as far as one can tell without writing."""
        if not self._local:
            return not is_hub_url(self._run.url)
        place = os.path.join(self._run.path, NOTES)
        return os.access(place if os.path.isdir(place) else self._run.path, os.W_OK | os.X_OK)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        place = self._run.location(NOTES)
        try:
            if is_hub_url(place):
                raise StorageError(READ_ONLY)
            if not self._local:
                yield
                return
            path = os.path.join(self._run.path, NOTES)
            os.makedirs(path, exist_ok=True)
            with locked(os.path.join(path, "all")):
                yield
        except (StorageError, OSError) as error:
            refused = isinstance(error, StorageError) and not isinstance(error, StorageUnreachable)
            if refused or isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
                raise NotesReadOnly(f"{place}: notes can't be kept there: {error}") from error
            raise

    def _refresh(self) -> None:
        if self._was_read and is_hub_url(self._run.url):
            return  # nobody writes there while it is served
        found = self._listed()
        gone = self._files.keys() - found.keys()
        for path in gone:
            del self._files[path]
        new = [path for path, listed in found.items() if path not in self._files or self._files[path][0] != listed]
        if new:
            contents = patiently(partial(self._contents, new), NOTES_PATIENCE)
            self._files |= {path: (found[path], _parse(path, content)) for path, content in contents.items()}
        if new or gone:
            self._merge()
        self._was_read = True

    def _listed(self) -> dict[str, Listed]:
        """What tells whether a file of notes changed, of each by its path."""
        folder, whole = (posixpath.join(self._run.path, name) for name in (NOTES, NOTES_FILE))
        if self._local:
            return patiently(lambda: _local_files(folder, whole), NOTES_PATIENCE)
        fs, entries = self._run.fs, []
        fs.invalidate_cache()
        for ask in (lambda: fs.ls(folder, detail=True), lambda: [fs.info(whole)]):
            with suppress(FileNotFoundError, NotADirectoryError):
                entries += patiently(ask, NOTES_PATIENCE)
        return {info["name"]: info for info in entries if info["name"].endswith(".json")}

    def _contents(self, paths: list[str]) -> dict[str, bytes]:
        """What is in these files, but for those that are gone meanwhile; object stores are asked for many at once."""
        contents = {}
        for path, content in zip(paths, self._run.fs.cat_ranges(paths, None, None, on_error="return"), strict=True):
            if isinstance(content, Exception):
                if isinstance(content, FileNotFoundError):
                    continue
                raise content
            contents[path] = bytes(content)
        return contents

    def _merge(self) -> None:
        """Of two notes for one feature the later one, of equally old ones the feature's own file."""
        merged: dict[int, FeatureNote] = {}
        for path in sorted(self._files, key=lambda path: posixpath.basename(path) != NOTES_FILE):
            for feature, each in self._files[path][1].items():
                if feature not in merged or _when(each.changed) >= _when(merged[feature].changed):
                    merged[feature] = each
        self._merged = merged
        self.known = MappingProxyType({feature: each for feature, each in merged.items() if each.note or each.star})


def read_notes(run: RunDirectory) -> Mapping[int, FeatureNote]:
    """The notes of one transcoder's features, by feature; those without note and star left out.

    Raises StorageError if they can't be read: none is another answer.
    """
    try:
        return Notes(run).read()
    except StorageError as error:
        raise type(error)(f"the notes of {run.url} can't be read: {error}") from error
    except Exception as error:  # of the storage
        message = f"the notes of {run.url} can't be read: {type(error).__name__}: {one_line(error)}"
        raise StorageUnreachable(message) from error


def notes_to_json(notes: Mapping[int, FeatureNote]) -> bytes:
    """notes.json."""
    return _ALL.dump_json(dict(sorted(notes.items())), indent=1) + b"\n"


def _local_files(folder: str, whole: str) -> dict[str, Listed]:
    """As `Notes._listed`; fsspec takes twice as long for thousands of files."""
    found = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                with suppress(FileNotFoundError):  # gone meanwhile
                    found[entry.path] = _stat(entry.stat())
    with suppress(FileNotFoundError):
        found[whole] = _stat(os.stat(whole))
    return found


def _stat(info: os.stat_result) -> Listed:
    return {"size": info.st_size, "mtime": info.st_mtime_ns, "ino": info.st_ino}


def _when(changed: str) -> datetime:
    """The time of a note; the oldest where there is none, or where people wrote something else."""
    try:
        found = datetime.fromisoformat(changed)
    except ValueError:
        return _OLDEST
    if not 1 < found.year < datetime.max.year:  # a later time than the last one can't be written
        return _OLDEST
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


def _parse(path: str, content: bytes) -> dict[int, FeatureNote]:
    """Nothing of a file or an entry that is none of ours: people write them, too."""
    name = posixpath.basename(path)
    if len(content) > (limit := MOST_BYTES if name == NOTES_FILE else MOST_BYTES_OF_ONE):
        logger.warning("%s is no file of notes and is passed over: it has %d bytes, over %d", path, len(content), limit)
        return {}
    try:
        read = from_json(content)
        entries = read if name == NOTES_FILE else {name.removesuffix(".json"): read}
        if not isinstance(entries, dict):
            raise ValueError("an object is wanted")
    except ValueError:
        logger.warning("%s is no file of notes and is passed over", path)
        return {}
    notes, wrong = {}, 0
    for feature, entry in entries.items():
        try:
            notes[int(feature)] = FeatureNote.model_validate(entry)
        except ValueError:
            wrong += 1
    if wrong:
        logger.warning(
            "%s is no file of notes in %d of its %d entries, which are passed over", path, wrong, len(entries)
        )
    return notes
