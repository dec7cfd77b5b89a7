"""The runs of a directory: finished ones by the index, others by what their directories hold."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from mtc.config import RunConfig
from mtc.errors import exit_code
from mtc.record import Record
from mtc.storage.aliases import read_aliases
from mtc.storage.ending import read_ending
from mtc.storage.files import absolute, filesystem, patiently
from mtc.storage.index import MANIFEST, IndexedRun, RunIndex, at_once, index_entry
from mtc.storage.lease import holders
from mtc.storage.runs import TOKEN_STORE, WRITER, RunDirectory, RunError

WATCH_SECONDS = 6.0
"""For which jobs' signs of life are watched; they change every 5 s."""
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]+")
State = Literal["finished", "running", "unfinished", "failed"]
"""Published; some job works on it; no job does, so that the same command continues it; the same, and the last job that
began work failed, by its own note (mtc.storage.ending): neither killed nor interrupted."""


class RunRow(Record):
    """One run of a list."""

    run_id: str
    """Name of the run."""
    state: State
    """How far the run is."""
    when: str
    """When it was published, of a run that is not finished its newest file, ISO 8601, UTC; empty if that is not
    known."""
    base_model: str
    """The language model that it imitates; empty if its configuration can't be read."""
    layers: list[int]
    """Layers of the language model, ascending."""
    num_features: int
    """Size of the dictionary of each layer, of a sweep the largest; 0 if that is not known."""
    fvu: list[float]
    """Held-out FVU of the full dictionary of each of its transcoders; empty if it was not analysed."""
    loss_recovered: list[float]
    """Share of the loss of zero ablation that is recovered, of each; empty if that was not measured."""
    bytes: int
    """Size of the published files, of a run that is not finished of all."""
    aliases: list[str]
    """Names that people gave it, and `latest`."""


class Stored(NamedTuple):
    """A file as the storage lists it."""

    name: str
    """Its path below the directory that was listed."""
    bytes: int
    modified: float | None
    """When it was last written, seconds since 1970 by the storage's clock; None where the storage does not say."""


def finished_runs(root: str) -> dict[str, IndexedRun]:
    """What is known of every finished run by its directory's name.

    Three calls to the storage, and some for each run that the index lacks.
    """
    found, names = RunIndex(root).read(), run_names(root)
    missing = [name for name in names if name not in found]
    read = dict(zip(missing, at_once(lambda name: _from_manifest(root, name), missing), strict=True))
    entries = ((name, found.get(name) or read[name]) for name in names)
    return {name: entry for name, entry in entries if entry}


def run_names(root: str) -> list[str]:
    """Names of the directories that may be runs."""
    fs, path = filesystem(absolute(root))
    fs.invalidate_cache()  # others write here too
    try:
        listed = patiently(lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        raise RunError(f"no directory of runs at {root}") from None
    names = (posixpath.basename(each["name"].rstrip("/")) for each in listed if each["type"] == "directory")
    return sorted(name for name in names if _NAME.fullmatch(name))


def list_runs(root: str, watch_seconds: float = WATCH_SECONDS) -> list[RunRow]:
    """All runs of a directory, newest first. Those that are not finished are watched together for `watch_seconds`."""
    root = absolute(root).rstrip("/")
    finished, names = finished_runs(root), names_of_runs(root)
    rows = [_finished(name, entry, names.get(name, [])) for name, entry in finished.items()]
    others = [RunDirectory(posixpath.join(root, name)) for name in run_names(root) if name not in finished]
    stored = {run.run_id: files for run, files in zip(others, at_once(stored_files, others), strict=True)}
    others = [run for run in others if is_run(stored[run.run_id])]
    configs = {run.run_id: config for run, config in zip(others, at_once(read_config, others), strict=True)}
    others = [run for run in others if configs[run.run_id] or {f.name for f in stored[run.run_id]} & {MANIFEST, WRITER}]
    held = holders([run for run in others if has(stored[run.run_id], WRITER)], watch_seconds)
    rows += [_unfinished(run, configs[run.run_id], stored[run.run_id], run.url in held, names.get(run.run_id, []))
             for run in others]  # fmt: skip
    return sorted(rows, key=lambda row: (row.when, row.run_id), reverse=True)


def names_of_runs(root: str) -> dict[str, list[str]]:
    """Aliases, and `latest`, by the run that they name."""
    found: dict[str, list[str]] = {}
    for alias, about in read_aliases(root).items():
        found.setdefault(about.run_id.partition("/")[0], []).append(alias)
    if named := latest_name(root):
        found.setdefault(named, []).append("latest")
    return found


def latest_name(root: str) -> str | None:
    """The run that `latest` names; None if it names none."""
    fs, path = filesystem(posixpath.join(absolute(root), "latest"))
    fs.invalidate_cache()
    try:
        return bytes(patiently(lambda: fs.cat_file(path))).decode().strip()
    except (FileNotFoundError, IsADirectoryError):
        return None


def stored_files(run: RunDirectory) -> list[Stored]:
    """All files below a directory by name; none if it is not there."""
    run.fs.invalidate_cache()
    try:
        found = patiently(lambda: run.fs.find(run.path, detail=True))
    except FileNotFoundError:
        return []
    prefix = run.path.rstrip("/") + "/"
    return [Stored(path.removeprefix(prefix), int(about.get("size") or 0), _modified(about))
            for path, about in sorted(found.items())]  # fmt: skip


def is_run(files: Iterable[Stored]) -> bool:
    """Whether a directory with these files may be one that a job wrote; others have files of these names, too."""
    names = {file.name for file in files}
    return bool(names & {"config.yaml", MANIFEST, WRITER}) or any(n.startswith("checkpoints/step-") for n in names)


def is_ours(run: RunDirectory, files: Sequence[Stored]) -> bool:
    """Whether a directory is a run beyond doubt: its configuration is that of one, or nothing but a job's sign of life
    is left."""
    return all(file.name == WRITER for file in files) or read_config(run) is not None


def read_config(run: RunDirectory) -> RunConfig | None:
    """What the run was told; None for a directory that is no run, or one whose configuration can't be read."""
    try:
        return run.config()
    except (RunError, ValueError):
        return None


def newest(files: Iterable[Stored]) -> float | None:
    """When the last of some files was written; None if the storage does not say of each, or there are none."""
    times = [file.modified for file in files]
    known = [time for time in times if time is not None]
    return max(known) if known and len(known) == len(times) else None


def is_old(files: Sequence[Stored], before: float) -> bool:
    """Whether nothing was written since, a sign of life neither."""
    last = newest(files)
    return last is not None and last < before


def has(files: Iterable[Stored], name: str) -> bool:
    """Whether a file of this name is among them."""
    return any(file.name == name for file in files)


def token_stores(run: RunDirectory, entry: IndexedRun | None = None) -> tuple[set[str], bool]:
    """Where the tokenised text lies that a run's jobs have read, and whether that is all. `entry` is what is known of a
    finished run, if that was asked for already."""
    entry = entry or _from_manifest(*posixpath.split(run.url.rstrip("/")))
    try:
        noted = {str(json.loads(run.read(TOKEN_STORE))["url"])}
    except (RunError, ValueError, KeyError, TypeError):
        noted = set()
    return noted | set(entry.token_stores if entry else ()), bool(noted) or (entry is not None and entry.stores_known)


def iso(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _from_manifest(root: str, name: str) -> IndexedRun | None:
    try:
        entry = index_entry(RunDirectory(posixpath.join(root, name)))
    except (RunError, ValueError, KeyError):
        return None  # unfinished, damaged, or of a version that this one can't read
    return entry if entry.run_id == name else None


def _finished(name: str, entry: IndexedRun, names: Sequence[str]) -> RunRow:
    models = entry.models
    return RunRow(
        run_id=name, state="finished", when=entry.created, base_model=models[0].base_model if models else "",
        layers=sorted({layer for model in models for layer in model.layers}),
        num_features=max((model.num_features for model in models), default=0),
        fvu=[value for model in models for value in model.fvu],
        loss_recovered=[value for model in models for value in model.loss_recovered],
        bytes=entry.bytes, aliases=list(names),
    )  # fmt: skip


def _unfinished(
    run: RunDirectory, config: RunConfig | None, files: Sequence[Stored], held: bool, names: Sequence[str]
) -> RunRow:
    ending = None if held else read_ending(run)
    failed = ending is not None and ending.exit_code != exit_code(KeyboardInterrupt())
    return RunRow(
        run_id=run.run_id, state="running" if held else "failed" if failed else "unfinished",
        when=iso(newest(files)), base_model=config.model.name if config else "",
        layers=sorted({sites.layer for sites in config.model.sites}) if config else [],
        num_features=max(m.config.transcoder.num_features for m in config.members()) if config else 0,
        fvu=[], loss_recovered=[], bytes=sum(file.bytes for file in files), aliases=list(names),
    )  # fmt: skip


def _modified(about: dict[str, Any]) -> float | None:
    """Each kind of storage says it in its own words: local disks, s3, gs, memory."""
    for key in ("mtime", "LastModified", "updated", "last_modified", "created"):
        match about.get(key):
            case datetime() as when:
                return when.timestamp()
            case int() | float() as seconds:
                return float(seconds)
            case str() as text:
                return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    return None
