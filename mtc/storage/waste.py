"""What of a directory of runs nobody needs any more.

Never what an alias names, what a living job holds, or tokenised text that a run may read. Ages are those of the newest
file by the storage's clock; where that does not tell, nothing is old.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mtc.storage.aliases import TOKENS
from mtc.storage.files import StorageError, absolute
from mtc.storage.hub import READ_ONLY, is_hub_url
from mtc.storage.index import MANIFEST, IndexedRun, at_once
from mtc.storage.lease import holders
from mtc.storage.run_list import (
    WATCH_SECONDS,
    Stored,
    finished_runs,
    has,
    is_old,
    is_ours,
    is_run,
    iso,
    names_of_runs,
    newest,
    run_names,
    stored_files,
    token_stores,
)
from mtc.storage.runs import WRITER, RunDirectory, RunError

STORE_FILE = "store.json"
_STORE = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
"""Token stores as mtc.text names them, which imports from here."""
DAY = 86_400.0
WRITING_SECONDS = 3600.0
"""A file that is being written is younger, and so is a checkpoint."""


class Waste(NamedTuple):
    """Something that can go."""

    url: str
    """The file or directory."""
    kind: str
    """What it is: `checkpoints`, `unfinished run`, `token store`, ..."""
    bytes: int
    reason: str
    """Why nobody needs it."""
    holder: str
    """The run or token store whose lease is taken to remove it; empty for a file beside them."""


class Found(NamedTuple):
    """What can go, and what of the rest one may wonder about."""

    waste: list[Waste]
    kept: list[str]
    """Lines that say what stays, and why."""


class Run(NamedTuple):
    """One run as it was found."""

    directory: RunDirectory
    files: list[Stored]
    entry: IndexedRun | None
    """What is known of it if it is finished."""
    names: list[str]
    """Aliases, and `latest`."""

    @property
    def finished(self) -> bool:
        return has(self.files, MANIFEST)


def find_waste(
    root: str, days: float, tokens: str | None = None, also: Sequence[str] = (), watch_seconds: float = WATCH_SECONDS
) -> Found:
    """What of a directory of runs can go.

    Args:
        days: age of the newest file of unfinished runs and of token stores that go.
        tokens: directory of token stores; by default `tokens` in `root`, if it is there.
        also: other directories of runs that read these stores.
    """
    root = absolute(root).rstrip("/")
    if is_hub_url(root):
        raise StorageError(f"{root}: {READ_ONLY}")
    runs, before = _runs(root), time.time() - days * DAY
    readers = [run for other in also for run in _runs(absolute(other).rstrip("/"))] + runs
    held = _held_ones(readers, watch_seconds)
    waste, kept = _beside(root), [f"run {run.directory.run_id}: a job holds it" for run in runs if _held(run, held)]
    for run in runs:
        if not _held(run, held):
            found, why = _of_run(run, before)
            if found and not is_ours(run.directory, run.files):
                found, why = [], "its config.yaml is not one of a run, or of another version"
            waste += found
            kept += [f"run {run.directory.run_id}: {why}"] if why else []
    gone = {each.url for each in waste if each.kind == "unfinished run"}
    stores, others = _of_tokens(
        absolute(tokens or posixpath.join(root, TOKENS)).rstrip("/"),
        [run for run in readers if run.directory.url not in gone], held, before, watch_seconds,
    )  # fmt: skip
    return Found(waste + stores, kept + others)


def why_needed(store: RunDirectory, roots: Sequence[str], watch_seconds: float = WATCH_SECONDS) -> str:
    """Why a token store must stay as the runs of some directories are now; empty if nothing says so."""
    runs = [run for root in roots for run in _runs(absolute(root).rstrip("/"))]
    used, reason = _used_stores(runs, _held_ones(runs, watch_seconds))
    return "a run reads it" if store.run_id in used else reason if store.exists(STORE_FILE) else ""


def _runs(root: str) -> list[Run]:
    finished, names = finished_runs(root), names_of_runs(root)
    places = [RunDirectory(posixpath.join(root, name)) for name in run_names(root)]
    found = zip(places, at_once(stored_files, places), strict=True)
    return [Run(place, files, finished.get(place.run_id), names.get(place.run_id, []))
            for place, files in found if is_run(files)]  # fmt: skip


def _held_ones(runs: Sequence[Run], watch_seconds: float) -> set[str]:
    return holders([run.directory for run in runs if has(run.files, WRITER)], watch_seconds)


def _held(run: Run, held: set[str]) -> bool:
    return run.directory.url in held


def _of_run(run: Run, before: float) -> tuple[list[Waste], str]:
    """What of a run that nobody holds can go, and what stays that one may wonder about."""
    url, files, why = run.directory.url, run.files, ""
    checkpoints = [file for file in files if file.name.startswith("checkpoints/")]
    waste: list[Waste] = []
    if run.finished and checkpoints:
        if _keeps_checkpoints(run.directory):
            why = f"output.keep_checkpoints_after_finish keeps {_size(checkpoints):,} bytes of checkpoints"
        else:
            waste.append(_waste(url, "checkpoints", checkpoints, "the run is finished", "checkpoints"))
    elif not run.finished and run.names:
        why = f"it is not finished, but {', '.join(run.names)} names it"
    elif not run.finished and is_old(files, before):
        return [_waste(url, "unfinished run", files, f"nothing was written since {iso(newest(files))}")], ""
    if not run.finished:
        waste += _begun_checkpoints(url, checkpoints)
    waste += _temporary(url, [file for file in files if not file.name.startswith("checkpoints/")])
    return waste, why


def _keeps_checkpoints(run: RunDirectory) -> bool:
    try:
        return run.config().output.keep_checkpoints_after_finish
    except RunError:  # of another version: what it asked for is not known
        return True


def _begun_checkpoints(url: str, checkpoints: Sequence[Stored]) -> Iterator[Waste]:
    """Of a run that goes on some day: those that were never completed, or whose removal was interrupted."""
    by_name: dict[str, list[Stored]] = {}
    for file in checkpoints:
        by_name.setdefault(file.name.split("/")[1], []).append(file)
    for name, files in by_name.items():
        place = f"checkpoints/{name}"
        whole = any(file.name in (f"{place}/checkpoint.json", f"{place}/damaged.json") for file in files)
        if name.startswith("step-") and not whole and is_old(files, time.time() - WRITING_SECONDS):
            yield _waste(url, "checkpoint", files, "it was never completed, or is half removed", place)


def _temporary(url: str, files: Sequence[Stored]) -> Iterator[Waste]:
    for file in files:
        old = file.modified is not None and file.modified < time.time() - WRITING_SECONDS
        if file.name.endswith(".tmp") and old:
            yield _waste(url, "temporary file", [file], "whoever wrote it is dead", file.name)


def _beside(root: str) -> list[Waste]:
    """Temporary files that lie directly in a directory of runs."""
    run = RunDirectory(root)
    names = [name for name in run.names() if name.endswith(".tmp")]
    files = [Stored(name, file.bytes, file.modified)
             for name in names for file in stored_files(RunDirectory(run.location(name)))]  # fmt: skip
    return [waste._replace(holder="") for waste in _temporary(root, files)]


def _of_tokens(
    tokens: str, runs: Sequence[Run], held: set[str], before: float, watch_seconds: float
) -> tuple[list[Waste], list[str]]:
    """Token stores that none of the runs has read."""
    place = RunDirectory(tokens)
    names = [name for name in place.names() if _STORE.fullmatch(name)]
    stores = [RunDirectory(place.location(name)) for name in names]
    files = dict(zip(names, at_once(stored_files, stores), strict=True))
    if not names:
        return [], []
    used, reason = _used_stores(runs, held)
    building = holders([store for store in stores if has(files[store.run_id], WRITER)], watch_seconds)
    kept = [f"token store {store.run_id}: a job is building it" for store in stores if store.url in building]
    waste = []
    for store in stores:
        name, old = store.run_id, is_old(files[store.run_id], before)
        if store.url in building or name in used or not old:
            continue
        if not has(files[name], STORE_FILE):
            waste.append(_waste(store.url, "token store", files[name], "it was never finished"))
        elif reason:
            kept.append(f"token store {name}: {reason}")
        else:
            waste.append(_waste(store.url, "token store", files[name], "no run names it"))
    return waste, kept


def _used_stores(runs: Sequence[Run], held: set[str]) -> tuple[set[str], str]:
    """Names of the token stores that runs have read, and why others may be needed; empty if they are not."""
    used, unknown = set[str](), list[str]()
    for run in runs:
        urls, known = token_stores(run.directory, run.entry)
        used |= {posixpath.basename(url.rstrip("/")) for url in urls}
        unknown += [] if known else [run.directory.run_id]
    return used, f"run {unknown[0]} does not say which it reads" if unknown else "a job works" if held else ""


def _waste(holder: str, kind: str, files: Sequence[Stored], reason: str, name: str = "") -> Waste:
    return Waste(posixpath.join(holder, name).rstrip("/"), kind, _size(files), reason, holder)


def _size(files: Sequence[Stored]) -> int:
    return sum(file.bytes for file in files)
