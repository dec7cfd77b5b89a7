"""Removes runs, and what else nobody needs, so that no reader is ever misled.

What is removed goes under the lease of the run, so that no job begins there meanwhile, its manifests first: a run that
is half removed is one that is not finished. Interrupted anywhere, it can be done again.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from contextlib import suppress

from mtc.storage.aliases import read_aliases
from mtc.storage.files import StorageError, absolute, patiently, write_atomic
from mtc.storage.hub import READ_ONLY, is_hub_url
from mtc.storage.index import MANIFEST, RunIndex, at_once
from mtc.storage.lease import Lease
from mtc.storage.run_list import (
    finished_runs,
    has,
    is_old,
    is_ours,
    is_run,
    latest_name,
    names_of_runs,
    run_names,
    stored_files,
)
from mtc.storage.runs import WRITER, RunDirectory, RunError
from mtc.storage.waste import DAY, STORE_FILE, Waste, why_needed


def remove_waste(waste: Waste, days: float, roots: Sequence[str]) -> None:
    """Remove it, if it is still what it was; a token store if no run of the directories `roots` needs it by now.

    Raises RunError if a job works there now, or did meanwhile.
    """
    if not waste.holder:
        return _quietly(RunDirectory(posixpath.dirname(waste.url)), posixpath.basename(waste.url))
    holder = RunDirectory(waste.holder)
    with Lease(holder):
        files = [file for file in stored_files(holder) if file.name != WRITER]  # which is this process's own
        old, finished = is_old(files, time.time() - days * DAY), has(files, MANIFEST)
        same = {"checkpoints": finished, "unfinished run": old and not finished, "token store": old}
        if files and not same.get(waste.kind, True):
            raise RunError(f"{waste.url} has changed meanwhile")
        if waste.kind == "token store" and (reason := why_needed(holder, roots)):
            raise RunError(f"{waste.url} is needed by now: {reason}")
        if waste.url != waste.holder:
            _quietly(holder, waste.url.removeprefix(f"{waste.holder}/"))
        else:
            _quietly(holder, STORE_FILE)  # first, so that no job takes it for whole
            _empty(holder)
    _remove_empty(holder)


def remove_run(run: RunDirectory, force: bool = False) -> int:
    """Remove a run of one transcoder or of several; the bytes that are free then. `latest` moves to the newest run that
    is left.

    Raises RunError for a run that an alias names, that `latest` names or a rollback would go back to
    (unless `force`), that a job holds, that is one
    transcoder of several, or that is not there.
    """
    check_removable(run, force)
    root, name = posixpath.split(run.url.rstrip("/"))
    with Lease(run):
        check_removable(run, force)  # it may have been given a name while the lease was waited for
        files = stored_files(run)
        if latest_name(root) == name:
            _move_latest(root, name)
        RunIndex(root).forget(name)
        names = [file.name for file in files if posixpath.basename(file.name) == MANIFEST]
        manifests = {name: run.read(name) for name in sorted(names, key=lambda each: each.count("/"))}
        for manifest in manifests:  # the whole before its members
            _quietly(run, manifest)
        try:
            _check_aliases(root, name)  # a promotion looks for the manifest after it has moved the alias
        except RunError:
            for manifest in reversed(manifests):
                run.write(manifest, manifests[manifest])
            raise
        _empty(run)
    _remove_empty(run)
    return sum(file.bytes for file in files)


def check_removable(run: RunDirectory, force: bool = False) -> None:
    """Raises RunError as `remove_run`, but for jobs."""
    if is_hub_url(run.url):
        raise StorageError(f"{run.url}: {READ_ONLY}")
    root, name = posixpath.split(run.url.rstrip("/"))
    files = stored_files(run)
    if not is_run(files):
        raise RunError(f"no run at {run.url}")
    if not is_ours(run, files) and not _has_manifest(run):
        raise RunError(f"{run.url} has neither a configuration nor a manifest of a run: remove it by hand")
    above = RunDirectory(root)
    if above.exists("config.yaml") and name in above.members():
        raise RunError(f"{run.url} is one transcoder of a run of several, which are removed together: name {root}")
    _check_aliases(root, name)
    if latest_name(root) == name and not force:
        raise RunError(f"run {name} is what {posixpath.join(root, 'latest')} names: --force removes it all the same")
    if not force and (aliases := _goes_back(root, name)):
        raise RunError(
            f"run {name} is what a rollback of {', '.join(aliases)} would go back to: --force removes it all the same"
        )


def _manifest(run: RunDirectory) -> bytes | None:
    try:
        return run.read(MANIFEST)
    except RunError:
        return None


def _goes_back(root: str, name: str) -> list[str]:
    """Aliases whose rollback would give their name to the run: the last that had it before and is finished."""
    found = []
    for alias, about in read_aliases(root).items():
        there = (run_id for run_id in about.before() if RunDirectory(posixpath.join(root, run_id)).is_finished())
        if next(there, "").partition("/")[0] == name:
            found.append(alias)
    return found


def _check_aliases(root: str, name: str) -> None:
    if aliases := [each for each in names_of_runs(root).get(name, []) if each != "latest"]:
        raise RunError(f"run {name} has the alias {', '.join(aliases)}: give that to another run first")


def _has_manifest(run: RunDirectory) -> bool:
    try:
        return bool(run.manifest())
    except (RunError, ValueError):
        return False


def repair_index(root: str) -> tuple[int, int]:
    """Write the entries that the index of a directory of runs lacks or that are of an older manifest, as a version
    without an index leaves them, and remove those of runs that are gone; how many each."""
    root = absolute(root).rstrip("/")
    index, names = RunIndex(root), set(run_names(root))
    known = index.read()
    there = sorted(known.keys() & names)
    found = at_once(lambda name: _manifest(RunDirectory(posixpath.join(root, name))), there)
    manifests = dict(zip(there, found, strict=True))
    gone = (known.keys() - names) | {name for name, manifest in manifests.items() if manifest is None}
    missing = finished_runs(root).keys() - known.keys()
    missing |= {name for name, manifest in manifests.items() if manifest and not index.is_of(name, manifest)}
    for name in gone:
        index.forget(name)
    for name in missing:
        run = RunDirectory(posixpath.join(root, name))
        with suppress(RunError), Lease(run):  # else a job publishes it anew
            index.forget(name)
            index.add(run, run.read(MANIFEST))
    return len(missing), len(gone)


def _move_latest(root: str, leaving: str) -> None:
    """Let `latest` name the newest finished run but `leaving`, or nothing if there is none."""
    left = [(entry.created, name) for name, entry in finished_runs(root).items() if name != leaving]
    url = posixpath.join(root, "latest")
    if latest_name(root) != leaving:  # a run was published while the others were read
        return
    if left:
        return patiently(lambda: write_atomic(url, max(left)[1].encode()))
    _quietly(RunDirectory(root), "latest")


def _empty(run: RunDirectory) -> None:
    """Remove everything but this process's sign of life; the configuration last, by which what is left is known to be
    of a run."""
    for name in sorted(run.names(), key=lambda name: name == "config.yaml"):
        if name != WRITER:
            _quietly(run, name)


def _quietly(run: RunDirectory, name: str) -> None:
    with suppress(FileNotFoundError):
        patiently(lambda: run.fs.rm(posixpath.join(run.path, name), recursive=True))


def _remove_empty(run: RunDirectory) -> None:
    """Of storage that has directories; one that somebody writes into again stays."""
    with suppress(OSError, NotImplementedError):
        run.fs.rmdir(run.path)
