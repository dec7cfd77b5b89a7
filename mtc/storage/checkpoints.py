"""Checkpoints of a training run, on a local path or any fsspec URL.

    <run>/checkpoints/step-00001000-3fa9c2d1/trainer-layer17.safetensors ...   files of every rank
                                             rank-0.json, rank-1.json          each rank's sizes and sha256
                                             checkpoint.json                   CheckpointManifest, written last

The second number names the start of the trainers that wrote it, so that two starts never share a directory. One
without checkpoint.json was not completed: readers do not see it. Files are written in a thread of their own from a
snapshot, and storage that fails for a while is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mtc.record import Record
from mtc.storage.runs import FileEntry, RunDirectory, RunError

logger = logging.getLogger(__name__)
FORMAT_VERSION = 3
MANIFEST = "checkpoint.json"
DAMAGED = "damaged.json"
LISTING_SECONDS = 90.0
"""Seconds for which an NFS client may show what a directory held before."""
_NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{8}(-result)?")


class DamagedError(RunError):
    """A checkpoint's files are not those that were written."""


class NotVisibleError(RunError):
    """What another node has written is not seen on this one yet; starting again may help."""

    exit_code = 1
    event = "failed"


class CheckpointManifest(Record):
    format_version: int
    """Layout of the checkpoint; readers refuse another one."""
    step: int
    """Optimizer steps that were done when the checkpoint was begun."""
    world_size: int
    """Trainers that wrote the checkpoint."""
    work: str
    """Digest of the run's work units: their numbers in the checkpoint mean these windows."""
    created: str
    """When the checkpoint was completed, ISO 8601, UTC."""
    files: dict[str, FileEntry]
    """Size and digest of every file of the checkpoint but the manifest."""


class Checkpoint(NamedTuple):
    """A checkpoint that was completed."""

    directory: RunDirectory
    """Directory that holds the checkpoint's files."""
    manifest: CheckpointManifest
    """What the checkpoint's files must be."""

    @property
    def name(self) -> str:
        return posixpath.basename(self.directory.url)

    @property
    def is_result(self) -> bool:
        """Whether training ended with this checkpoint."""
        return "result.json" in self.manifest.files

    def read(self, name: str) -> bytes:
        """The bytes of one of the checkpoint's files; raises DamagedError if they are not those that were written."""
        return _intact(self.directory, name, self.manifest.files[name])

    def verify(self) -> None:
        """Check every file of the checkpoint; raises DamagedError that names the first damaged one."""
        for name in self.manifest.files:
            self.read(name)


class Checkpoints:
    """All checkpoints of one run."""

    def __init__(self, run_url: str):
        self.url = posixpath.join(run_url, "checkpoints")
        self.directory = RunDirectory(self.url)

    def latest(self) -> Checkpoint | None:
        """The completed checkpoint of most steps, its files not checked; None if there is none.

        Raises RunError for one of another format.
        """
        names = self._completed()
        return self.open(names[-1]) if names else None

    def latest_intact(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The completed checkpoint of most steps whose files are those that were written.

        Damaged ones are set aside, so that `latest` agrees, and reported. Raises RunError if all are damaged.
        """
        for name in reversed(self._completed()):
            try:
                checkpoint = self.open(name)
                checkpoint.verify()
                return checkpoint
            except DamagedError as error:
                report(f"checkpoint {name} is not used: {error}")
                directory = self.subdirectory(name)
                directory.write(DAMAGED, str(error))
                directory.remove(MANIFEST)
        damaged = [name for name in self._names() if self.subdirectory(name).exists(DAMAGED)]
        if damaged:
            raise RunError(
                f"all checkpoints in {self.url} are damaged: {', '.join(damaged)}; give another output.run_id, or "
                "remove them to begin this run again"
            )
        return None

    def sweep(self, keep: int) -> None:
        """Remove all completed checkpoints but the last `keep`, and those before the last that were never completed.

        Later ones may be in work. Removes all that can be removed, then raises the first error.
        """
        completed, names = self._completed(), self._names()
        errors = []
        for name in names[: names.index(completed[-1])] if completed else []:
            if name in completed[-keep:]:
                continue
            directory = self.subdirectory(name)
            try:
                if name in completed:  # first, so that none is ever seen in part
                    directory.remove(MANIFEST)
                directory.remove()
            except Exception as error:  # of the storage; the others must not stay for it
                errors.append(error)
        if errors:
            raise errors[0]

    def remove(self) -> None:
        """Remove all: the run is finished. Interrupted, it leaves some that no reader sees."""
        for name in self._completed():
            self.subdirectory(name).remove(MANIFEST)
        if self.directory.exists():
            self.directory.remove()

    def _names(self) -> list[str]:
        found = [match for name in self.directory.names() if (match := _NAME.fullmatch(name))]
        return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), match[2] or "", match[0]))]

    def _completed(self) -> list[str]:
        if self.directory.exists("checkpoint_manager_snapshot.json"):  # of format 2, kept by Ray Train
            raise _unknown(self.url, 2)
        return [name for name in self._names() if self.subdirectory(name).exists(MANIFEST)]

    def open(self, name: str) -> Checkpoint:
        """A completed checkpoint; raises RunError if it is of another format, DamagedError if its manifest is
        damaged."""
        directory = self.subdirectory(name)
        try:
            raw = json.loads(directory.read(MANIFEST))
            if isinstance(raw, dict) and raw.get("format_version") not in (None, FORMAT_VERSION):
                raise _unknown(directory.location(MANIFEST), raw["format_version"])
            return Checkpoint(directory, CheckpointManifest.model_validate(raw))
        except ValueError as error:
            raise DamagedError(f"{directory.location(MANIFEST)} is damaged: {error}") from None

    def wait_for(self, name: str, seconds: float = LISTING_SECONDS) -> Checkpoint:
        """A completed checkpoint that another node may just have written; raises NotVisibleError if it does not
        appear."""
        deadline = time.monotonic() + seconds
        while not self.subdirectory(name).exists(MANIFEST):
            if time.monotonic() > deadline:
                raise NotVisibleError(f"{self.url}: checkpoint {name} is not visible here after {seconds:.0f} s")
            time.sleep(0.5)
        return self.open(name)

    def subdirectory(self, name: str) -> RunDirectory:
        """Where a checkpoint's files are, or are to be."""
        return RunDirectory(posixpath.join(self.url, name))


class CheckpointWriter:
    """One rank's part in writing checkpoints, in a thread of its own.

    Every rank writes its files; rank 0 waits for the others' and completes the checkpoint. One that cannot be written
    within `patience` seconds is given up and reported; the one before stays.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        start: int,
        rank: int,
        ranks: int,
        keep: int,
        report: Callable[..., None],
        patience: float = 120.0,
        work: str = "",
    ):
        self.checkpoints, self.start, self.rank, self.ranks, self.keep = checkpoints, start, rank, ranks, keep
        self.report, self.patience, self.work = report, patience, work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._began = time.monotonic()
        self._told: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written; reports it if that takes suspiciously long."""
        if self._last is None or self._last.done():
            return False
        seconds = time.monotonic() - self._began
        if seconds > 4 * self.patience and "slow" not in self._told:
            self._told.add("slow")
            message = f"a checkpoint is being written for {seconds:.0f} s, until it ends there is no other"
            self.report("checkpoint_slow", message)
        return True

    def save(self, step: int, files: Mapping[str, Callable[[], bytes]], result: bool = False) -> Future[None]:
        """Begin to write a checkpoint; `files` are called in the thread and must hold a snapshot. `result` marks the
        last one.

        The future ends when this rank's part is written, on rank 0 when the checkpoint is complete; it raises what
        prevented that, which is reported too.
        """
        self._began = time.monotonic()
        self._told.discard("slow")
        self._last = self._thread.submit(self._save, step, files, result)
        return self._last

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        self._thread.shutdown(wait=True)

    def _save(self, step: int, files: Mapping[str, Callable[[], bytes]], result: bool) -> None:
        began = time.monotonic()
        name = f"step-{step:08d}-{self.start:08x}" + "-result" * result
        directory = self.checkpoints.subdirectory(name)
        try:
            entries = {}
            for name, content in files.items():
                data = content()
                directory.write(name, data, self.patience)
                entries[name] = entry_of(data)
            record = json.dumps({name: entry.model_dump() for name, entry in entries.items()}).encode()
            directory.write(f"rank-{self.rank}.json", record, self.patience)
            if self.rank == 0:
                entries[f"rank-{self.rank}.json"] = entry_of(record)
                self._complete(step, directory, entries, 2 * self.patience + 4 * (time.monotonic() - began))
        except Exception as error:
            self.report("checkpoint_failed", f"the checkpoint was given up: {type(error).__name__}: {error}", step)
            if self.rank == 0:
                self._quietly(lambda: None if directory.exists(MANIFEST, self.patience) else directory.remove())
            raise
        if self.rank == 0:
            size = sum(entry.bytes for entry in entries.values())
            seconds = time.monotonic() - began
            self.report("checkpoint", f"checkpoint of {size / 1e6:.1f} MB in {seconds:.1f} s", step)
            self._quietly(lambda: self.checkpoints.sweep(self.keep))

    def _quietly(self, clean: Callable[[], None]) -> None:
        """Remove files that nobody reads; what is left of them is swept away after the next checkpoint."""
        try:
            clean()
        except Exception as error:  # of the storage
            logger.warning("old checkpoints in %s could not be removed: %s", self.checkpoints.url, error)
            if "stays" not in self._told:
                self._told.add("stays")
                message = f"old checkpoints could not be removed and take room: {type(error).__name__}: {error}"
                self.report("checkpoint_not_removed", message)

    def _complete(self, step: int, directory: RunDirectory, entries: dict[str, FileEntry], seconds: float) -> None:
        """Wait so many seconds for the other ranks' parts, then write the manifest."""
        deadline = time.monotonic() + seconds
        for rank in range(1, self.ranks):
            name = f"rank-{rank}.json"
            while not directory.exists(name):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} did not write its part within {seconds:.0f} s")
                time.sleep(0.1)
            record = directory.read(name)
            entries[name] = entry_of(record)
            entries |= {n: FileEntry.model_validate(e) for n, e in json.loads(record).items()}
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            step=step,
            world_size=self.ranks,
            work=self.work,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=entries,
        )
        directory.write(MANIFEST, manifest.model_dump_json(indent=1), self.patience)


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _intact(directory: RunDirectory, name: str, entry: FileEntry) -> bytes:
    try:
        data = directory.read(name)
    except RunError as error:  # it is not there
        raise DamagedError(str(error)) from None
    if entry_of(data) != entry:
        raise DamagedError(f"{directory.location(name)} is damaged: its size or sha256 is not the one that was written")
    return data


def _unknown(where: str, version: Any) -> RunError:
    return RunError(
        f"{where}: format_version {version!r} is not the one that this version continues, {FORMAT_VERSION}; "
        "give another output.run_id, or continue the run with the version that began it"
    )
