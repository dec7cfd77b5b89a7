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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mtc.results import FeatureNote
from mtc.storage.files import StorageError, StorageUnreachable, patiently
from mtc.storage.hub import READ_ONLY, is_hub_url
from mtc.storage.locks import locked
from mtc.storage.runs import NOTES, NOTES_FILE, RunDirectory

logger = logging.getLogger(__name__)

NOTES_PATIENCE = 5.0
"""Seconds for which storage that fails is asked again: somebody waits for a page."""
_ALL = TypeAdapter(dict[int, FeatureNote])


class NotesReadOnly(StorageError):
    """Notes can't be kept beside a run; the message says where and why."""


class Notes:
    """The notes of one transcoder's features, for any number of threads; files that changed are read again."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._local = "://" not in run.url or run.url.startswith("file://")
        self._lock = threading.Lock()
        self._files: dict[str, tuple[dict[str, Any], dict[int, FeatureNote]]] = {}
        """By path: what the storage said of the file, and what is in it."""
        self._was_read, self._again = False, 0.0

    def read(self) -> dict[int, FeatureNote]:
        """Those features that have a note or a star; while the storage fails, as they were last."""
        with self._lock:
            try:
                if time.monotonic() >= self._again:
                    self._refresh()
            except Exception as error:  # of the storage; whoever looks at a feature can do without
                logger.warning("the notes of %s can't be read now: %s", self._run.url, error)
                self._again = time.monotonic() + NOTES_PATIENCE  # others wait for the lock
            return {feature: each for feature, each in self._merged().items() if each.note or each.star}

    def update(self, feature: int, edit: Callable[[FeatureNote], FeatureNote]) -> FeatureNote:
        """Replace what is kept of a feature by what `edit` makes of it; returns that, with its time.

        Raises what `edit` does, NotesReadOnly where nothing can be written, and the storage's error if it fails for
        NOTES_PATIENCE seconds.
        """
        with self._lock, self._exclusively():
            self._refresh()
            before = self._merged().get(feature, FeatureNote())
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            after = edit(before).model_copy(update={"changed": max(now, before.changed)})
            self._run.write(f"{NOTES}/{feature}.json", after.model_dump_json(), NOTES_PATIENCE)
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
        found = {info["name"]: info for info in self._listed()}
        for path in self._files.keys() - found.keys():
            del self._files[path]
        for path, info in found.items():
            if path not in self._files or self._files[path][0] != info:
                content = patiently(partial(self._run.fs.cat_file, path), NOTES_PATIENCE)
                self._files[path] = info, _parse(path, bytes(content))
        self._was_read = True

    def _listed(self) -> list[dict[str, Any]]:
        """What the storage says of each file of notes."""
        fs, entries = self._run.fs, []
        fs.invalidate_cache()
        folder, whole = (posixpath.join(self._run.path, name) for name in (NOTES, NOTES_FILE))
        for ask in (lambda: fs.ls(folder, detail=True), lambda: [fs.info(whole)]):
            with suppress(FileNotFoundError, NotADirectoryError):
                entries += patiently(ask, NOTES_PATIENCE)
        return [info for info in entries if info["name"].endswith(".json")]

    def _merged(self) -> dict[int, FeatureNote]:
        """Of two notes for one feature the later one, of equally old ones the feature's own file."""
        merged: dict[int, FeatureNote] = {}
        for path in sorted(self._files, key=lambda path: posixpath.basename(path) != NOTES_FILE):
            for feature, each in self._files[path][1].items():
                if feature not in merged or each.changed >= merged[feature].changed:
                    merged[feature] = each
        return merged


def read_notes(run: RunDirectory) -> dict[int, FeatureNote]:
    """The notes of one transcoder's features, by feature; those without note and star left out."""
    return Notes(run).read()


def notes_to_json(notes: Mapping[int, FeatureNote]) -> bytes:
    """notes.json."""
    return _ALL.dump_json(dict(sorted(notes.items())), indent=1) + b"\n"


def _parse(path: str, content: bytes) -> dict[int, FeatureNote]:
    """Nothing of a file that is none of ours: people write them, too."""
    name = posixpath.basename(path)
    try:
        if name == NOTES_FILE:
            return _ALL.validate_json(content)
        return {int(name.removesuffix(".json")): FeatureNote.model_validate_json(content)}
    except (ValueError, ValidationError):
        logger.warning("%s is no file of notes and is passed over", path)
        return {}
