"""The index of a directory of runs: what is asked of every finished run, in a few calls to the storage for all.

    <root>/.index/<run id>@<digest of its manifest>.json    IndexedRun of one run
    <root>/.index/all.json                                  those of all runs, by the names of their files

It is a cache of the manifests. Each publication writes a file of its own, so that jobs which publish at once, on
storage without locks, never lose each other's; all.json may lack some of them, which are then read one by one. A run's
entry is removed before its manifest changes and written after it: a run without an entry, or with two, is read from its
manifest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mtc.errors import one_line
from mtc.record import Record
from mtc.storage.files import absolute, filesystem, patiently, write_atomic

logger = logging.getLogger(__name__)
INDEX, ALL, MANIFEST = ".index", "all.json", "manifest.json"
READERS = 16
"""Files that are read at the same time."""
T = TypeVar("T")
R = TypeVar("R")


class IndexedModel(Record):
    """What of a run answers as one model: all its layers, or, of a sweep, one of its transcoders."""

    run_id: str
    """Name that it is asked for by: the run's, of a sweep `<run id>/<name of the transcoder>`."""
    created: str
    """When it was published, ISO 8601, UTC."""
    sha256: str
    """Digest of its weights, `weights_digest`."""
    base_model: str
    """The language model that it imitates."""
    layers: list[int]
    """Layers of the language model, ascending."""
    num_features: int
    """Size of the dictionary of each layer."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    k: int
    """Active features per token on average, as trained."""
    fvu: list[float]
    """Held-out fraction of variance unexplained by the full dictionary of each layer; empty if it was not analysed."""
    loss_recovered: list[float]
    """Share of the loss of zero ablation that the full dictionary of each layer recovers; empty if that was not
    measured."""


class IndexedRun(Record):
    """What is known of a finished run without opening it."""

    run_id: str
    """Name of the run, that of its directory."""
    created: str
    """When it was published, ISO 8601, UTC."""
    bytes: int
    """Size of all published files."""
    token_stores: list[str]
    """Where the tokenised text lay that its analyses read."""
    stores_known: bool
    """Whether these are all: a run that was not analysed does not tell."""
    models: list[IndexedModel]
    """Those that its manifests tell of."""


_ALL = TypeAdapter(dict[str, IndexedRun])


class RunIndex:
    """The entries of one directory of runs. All methods raise the storage's error if it fails."""

    def __init__(self, root: str):
        self.root = absolute(root).rstrip("/")
        self.url = posixpath.join(self.root, INDEX)
        self.fs, self.path = filesystem(self.url)
        self._local = "://" not in self.root

    def read(self) -> dict[str, IndexedRun]:
        """Entries by run id, of those runs that have one which can be trusted; the run itself may be gone.

        Two calls to the storage, and one for each entry that all.json lacks.
        """
        names = self._names()
        by_run = defaultdict(list)
        for name in names:
            by_run[name.rpartition("@")[0]].append(name)
        single = {run_id: found[0] for run_id, found in by_run.items() if len(found) == 1}
        if not single:
            return {}
        known = self._read_all()
        missing = [name for name in single.values() if name not in known]
        known |= {name: entry for name, entry in zip(missing, at_once(self._read, missing), strict=True) if entry}
        return {
            run_id: known[name]
            for run_id, name in single.items()
            if name in known and known[name].run_id == run_id and not self._outdated(run_id, name)
        }

    def is_of(self, run_id: str, manifest: bytes) -> bool:
        """Whether the run has one entry, and that of this manifest; where looking costs nothing, `read` asks itself."""
        return [name for name in self._names() if name.rpartition("@")[0] == run_id] == [_entry_name(run_id, manifest)]

    def forget(self, run_id: str) -> None:
        """Remove the run's entries: its manifest is about to change, or to go."""
        for name in self._names():
            if name.rpartition("@")[0] == run_id:
                self._remove(posixpath.join(self.path, name))

    def add(self, run: Any, manifest: bytes) -> None:
        """Write the entry of a run, a `RunDirectory`, whose manifest has just been written.

        A failure is logged: the run is published, and read from its manifest.
        """
        name = _entry_name(run.run_id, manifest)
        try:
            entry = index_entry(run)
            self._write(name, entry.model_dump_json().encode())
            known, names = self._read_all() | {name: entry}, self._names()
            missing = [each for each in names if each not in known]
            known |= {each: found for each, found in zip(missing, at_once(self._read, missing), strict=True) if found}
            self._write(ALL, _ALL.dump_json({each: known[each] for each in names if each in known}))
        except Exception as error:  # of the storage, or of a run that can't be listed
            logger.info("%s: run %s is not in the index: %s", self.url, run.run_id, one_line(error))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            patiently(lambda: self.fs.rm_file(path))

    def _names(self) -> list[str]:
        self.fs.invalidate_cache()  # others write here too
        try:
            found = patiently(lambda: self.fs.ls(self.path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (posixpath.basename(path) for path in found)
        return sorted(name for name in names if "@" in name and name.endswith(".json"))

    def _read(self, name: str) -> IndexedRun | None:
        try:
            return IndexedRun.model_validate_json(self._content(name))
        except (FileNotFoundError, ValidationError):  # removed meanwhile; damaged, or of another version
            return None

    def _read_all(self) -> dict[str, IndexedRun]:
        try:
            return _ALL.validate_json(self._content(ALL))
        except (FileNotFoundError, ValidationError):
            return {}

    def _content(self, name: str) -> bytes:
        return bytes(patiently(lambda: self.fs.cat_file(posixpath.join(self.path, name))))

    def _write(self, name: str, content: bytes) -> None:
        patiently(lambda: write_atomic(posixpath.join(self.url, name), content))

    def _outdated(self, run_id: str, name: str) -> bool:
        """Whether the run's manifest is gone or newer than its entry, by hand or by a version without an index: on a
        disk, where looking costs nothing."""
        if not self._local:
            return False
        try:
            manifest = os.stat(os.path.join(self.root, run_id, MANIFEST))
            return manifest.st_mtime_ns > os.stat(os.path.join(self.path, name)).st_mtime_ns
        except OSError:
            return True


def _entry_name(run_id: str, manifest: bytes) -> str:
    return f"{run_id}@{hashlib.sha256(manifest).hexdigest()[:16]}.json"


def index_entry(run: Any) -> IndexedRun:
    """What a finished run's files say of it; `run` is a `mtc.storage.RunDirectory`. Raises RunError for one that can't
    be read."""
    manifest, config = run.manifest(), run.config()
    places = run.members() if config.sweep else {"": run}
    models, stores, known = [], set[str](), True
    for own in places.values():
        listed, settings = own.manifest(), own.config()
        several = len(settings.members()) > 1
        layers = {member.config.model.layer: f"{member.name}/" * several for member in settings.members()}
        figures = [_analysis(own, place, listed.files) for _, place in sorted(layers.items())]
        weights = [listed.files.get(f"{place}transcoder.safetensors") for _, place in sorted(layers.items())]
        found = [each["facts"].get("token_store") for each in figures if each]
        stores |= {url for url in found if url}
        known &= "import.json" in listed.files or (all(found) and len(found) == len(layers))
        if None in weights:
            continue  # no model: nothing that could answer
        models.append(
            IndexedModel(
                run_id=listed.run_id, created=listed.created, base_model=settings.model.name, layers=sorted(layers),
                sha256=weights_digest([entry.sha256 for entry in weights]),
                num_features=settings.transcoder.num_features, prefixes=list(settings.transcoder.prefixes),
                k=settings.transcoder.k, fvu=[each["evaluation"]["fvu"][-1] for each in figures if each],
                loss_recovered=_recovered(figures),
            )
        )  # fmt: skip
    size = sum(entry.bytes for entry in manifest.files.values())
    return IndexedRun(run_id=manifest.run_id, created=manifest.created, bytes=size, token_stores=sorted(stores),
                      stores_known=known, models=models)  # fmt: skip


def weights_digest(digests: Sequence[str]) -> str:
    """Digest of a model's weights: of the file of one layer, or of the digests of all layers' files, in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def at_once(call: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`call` of each, several at a time: storage answers slowly, but many."""
    items = list(items)
    if not items:
        return []
    with ThreadPoolExecutor(min(READERS, len(items)), thread_name_prefix="index") as threads:
        return list(threads.map(call, items))


def _analysis(run: Any, place: str, files: dict[str, Any]) -> dict[str, Any] | None:
    """One layer's analysis; None if there is none, or none that says these things."""
    if f"{place}analysis.json" not in files:
        return None
    try:
        found = json.loads(run.read(f"{place}analysis.json"))
        return found if found["evaluation"]["fvu"] and found["facts"] is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def _recovered(figures: Sequence[dict[str, Any] | None]) -> list[float]:
    losses = [each["evaluation"].get("loss") for each in figures if each]
    return [loss["recovered_zero"][-1] for loss in losses if loss and loss["ce_zero"] > loss["ce_clean"]]
