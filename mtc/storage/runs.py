"""The run directory: everything a finished run leaves, on a local path or any fsspec URL.

    <root>/<run id>/config.yaml            the RunConfig
                   transcoder.safetensors  weights, scalars and threshold
                   metrics.jsonl           one line per logged step
                   features.parquet        every figure of every feature, one row each
                   examples.parquet        activating examples, ordered by feature
                   contexts.parquet        random contexts with all that fires in them
                   analysis.json           mtc.results.analysis.Analysis
                   report/...              HTML, Markdown, JSON, plots
                   ledger.parquet          mtc.storage.ledger.SCHEMA: what was trained of each work unit
                   import.json             of imported weights: where they come from
                   events.jsonl            restarts, checkpoints that failed, spikes: one line each
                   labels.parquet          labels by a language model, if one was asked: mtc.storage.labels
                   embeddings.safetensors  vectors of labels, if they were asked for: mtc.storage.embeddings
                   labelling/...           what it answered, mtc.labels.journal
                   notes/..., notes.json   what people say of features, mtc.storage.notes
                   checkpoints/...         mtc.storage.checkpoints, until the run is finished
                   token_store.json        {"url"}: where the tokenised text is that its jobs read
                   writer.json             mtc.storage.lease, while a job writes the run
                   ended.json              mtc.storage.ending: how the last job that began work ended
                   manifest.json           sizes and sha256 of the above but labelling/ to ended.json, written last
    <root>/latest                          the id of the newest finished run
    <root>/aliases/<name>.json             mtc.storage.aliases: names that a promotion moves, such as `production`
    <root>/.index/...                      mtc.storage.index: what lists of runs show

A run of several transcoders (`model.layers`, `sweep`) has one such directory for each, `<root>/<run id>/layer<N>` or
`<root>/<run id>/<what the sweep sets>`, a run of its own for every reader; beside them lie its config.yaml, a report
that compares them, and a manifest of everything.

A directory without a manifest is a run in progress or one that failed: readers refuse it and `latest` never names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from mtc.config import ConfigError, RunConfig, make_config, parse_settings
from mtc.errors import MtcError
from mtc.record import Record
from mtc.results import FORMAT_VERSION as ANALYSIS_VERSION
from mtc.results import Analysis
from mtc.storage.files import PATIENCE, absolute, filesystem, patiently, write_atomic
from mtc.storage.hub import TOKEN, is_hub_url
from mtc.storage.index import INDEX, MANIFEST, RunIndex

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
WRITER = "writer.json"
ENDED = "ended.json"
NOTES, NOTES_FILE = "notes", "notes.json"
TOKEN_STORE = "token_store.json"
WORKING = {"checkpoints", "labelling", NOTES, NOTES_FILE, TOKEN_STORE, ENDED, INDEX}
"""What of a run no manifest names: directories of the jobs that write it, and what people say of it afterwards."""


class RunError(MtcError):
    """A run directory is missing, unfinished, damaged or of an unknown format; the message says which."""


class FileEntry(Record):
    bytes: int
    """Size of the file in bytes."""
    sha256: str
    """Digest of the file, hexadecimal."""


class Manifest(Record):
    format_version: int
    """Layout of the run directory; readers refuse one they do not know."""
    run_id: str
    """Name of the run: its directory's, for one transcoder of several `<run id>/<its name>`."""
    created: str
    """When the run was finished, ISO 8601, UTC."""
    files: dict[str, FileEntry]
    """Every file of the run by its relative path."""


class RunDirectory:
    """Reads and atomically writes the files of one run; `url` is a local path or an fsspec URL."""

    def __init__(self, url: str, run_id: str | None = None):
        self.url = absolute(url)
        self.fs, self.path = filesystem(self.url)
        self.run_id = run_id or posixpath.basename(self.path.rstrip("/"))

    def __repr__(self) -> str:
        return f"RunDirectory({self.url!r})"

    def location(self, name: str) -> str:
        """The URL or path of a file of this run."""
        return posixpath.join(self.url, name)

    def exists(self, name: str = "", patience: float = PATIENCE) -> bool:
        """Whether a file, or the directory itself, is there; raises the storage's error if that cannot be known within
        `patience` seconds."""
        path = posixpath.join(self.path, name) if name else self.path
        self.fs.invalidate_cache()  # others write here too
        try:
            patiently(lambda: self.fs.info(path), patience)  # `fs.exists` takes every error for a no
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self) -> list[str]:
        """Names of the files and directories that lie directly here; none if there is no such directory."""
        self.fs.invalidate_cache()
        try:
            found = patiently(lambda: self.fs.ls(self.path, detail=False))
        except FileNotFoundError:
            return []
        return [posixpath.basename(path.rstrip("/")) for path in found]

    def read(self, name: str) -> bytes:
        """The bytes of a file of this run; raises RunError if it is not there."""
        try:
            return bytes(patiently(lambda: self.fs.cat_file(posixpath.join(self.path, name))))
        except FileNotFoundError:
            raise RunError(f"{self.url} has no file {name!r}") from None

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; none if it is not there."""
        try:
            return json_lines(self.read(name))
        except RunError:
            return []

    def write(self, name: str, data: bytes | str, patience: float = PATIENCE) -> None:
        """Write a file so that a reader sees the old content or the new, never a part.

        Storage that fails is asked again for `patience` seconds, then its error is raised.
        """
        content = data.encode() if isinstance(data, str) else data
        patiently(lambda: write_atomic(self.location(name), content), patience)

    def remove(self, name: str = "") -> None:
        """Remove a file, or the whole directory."""
        path = posixpath.join(self.path, name) if name else self.path
        patiently(lambda: self.fs.rm(path, recursive=not name))

    def config(self) -> RunConfig:
        """What the run was told; raises RunError if that is not there or can't be read."""
        place = self.location("config.yaml")
        content = self.read("config.yaml")
        try:
            return make_config(parse_settings(content, place))
        except ConfigError as error:
            raise RunError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from None

    def members(self) -> dict[str, RunDirectory]:
        """Where the files of each of the run's transcoders lie, by its name: here, or in a directory of its own if
        there are several."""
        names = [member.name for member in self.config().members()]
        if len(names) == 1:
            return {names[0]: self}
        return {name: RunDirectory(self.location(name), f"{self.run_id}/{name}") for name in names}

    def is_finished(self) -> bool:
        return self.exists(MANIFEST)

    def manifest(self) -> Manifest:
        """The run's manifest; raises RunError for a run that is not there, not finished, or of an unknown format."""
        self.fs.invalidate_cache()  # others write here too
        try:
            raw: dict[str, Any] = json.loads(self.read(MANIFEST))
        except (RunError, NotADirectoryError):
            if self.exists():
                raise RunError(f"{self.url} has no {MANIFEST}: the run is not finished, or it failed") from None
            hidden = f": the hub has no such repository, revision or folder, or hides it from all without {TOKEN}"
            raise RunError(f"no run at {self.url}{hidden * is_hub_url(self.url)}") from None
        if raw.get("format_version") != FORMAT_VERSION:
            raise RunError(
                f"{self.url}/{MANIFEST}: format_version {raw.get('format_version')!r} is unknown; "
                f"this version reads {FORMAT_VERSION}"
            )
        return Manifest.model_validate(raw)

    def verify(self, names: Sequence[str] | None = None) -> Manifest:
        """Check the size and sha256 of all files, or of some, against the manifest.

        Raises RunError that names the file which is damaged or not in the manifest.
        """
        manifest = self.manifest()
        for name in manifest.files if names is None else names:
            self.read_verified(name, manifest)
        return manifest

    def read_verified(self, name: str, manifest: Manifest) -> bytes:
        """The bytes of a file that are those of the manifest; raises RunError as `verify`."""
        if name not in manifest.files:
            raise RunError(f"{self.url}: {MANIFEST} names no {name}")
        entry, data = manifest.files[name], self.read(name)
        if len(data) != entry.bytes:
            raise RunError(f"{self.url}: {name} has {len(data)} bytes, the manifest says {entry.bytes}")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise RunError(f"{self.url}: {name} is damaged, its sha256 differs from the manifest's")
        return data

    def publish(self, latest: bool = True) -> Manifest:
        """Write the manifest of all files present, then let `latest` name this run unless it is told not to."""
        prefix = self.path.rstrip("/") + "/"
        files = {}
        for found in sorted(patiently(lambda: self.fs.find(self.path))):
            name = found.removeprefix(prefix)
            if name in (MANIFEST, WRITER) or WORKING & set(name.split("/")) or name.endswith(".tmp"):
                continue
            data = self.read(name)
            files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            run_id=self.run_id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
        )
        content, above = manifest.model_dump_json(indent=1).encode(), posixpath.dirname(self.url.rstrip("/"))
        whole, _, member = self.run_id.partition("/")
        index = RunIndex(posixpath.dirname(above) if member else above)
        index.forget(whole)
        self.write(MANIFEST, content)
        if latest:
            patiently(lambda: write_atomic(posixpath.join(above, "latest"), self.run_id.encode()))
        if not member:  # of several transcoders all are published before the whole
            index.add(self, content)
        return manifest


def publish_whole(run: RunDirectory, latest: bool) -> None:
    """Let readers see a run of one transcoder or of several; of several each one first."""
    members = run.members()
    for own in members.values() if len(members) > 1 else ():
        own.publish(latest=False)
    run.publish(latest)


def note_token_store(run: RunDirectory, url: str) -> None:
    """Write down which tokenised text the run's job reads, before anything else tells."""
    run.write(TOKEN_STORE, json.dumps({"url": url}))


def require_one_layer(run: RunDirectory) -> None:
    """Raises RunError if the run holds several transcoders, saying where each of them lies."""
    members = run.members()
    if len(members) > 1:
        places = ", ".join(own.url for own in members.values())
        what = f"{len(members)} transcoders" if run.config().sweep else f"the transcoders of {len(members)} layers"
        raise RunError(f"{run.url} holds {what}; name one of them: {places}")


def json_lines(content: bytes) -> list[Any]:
    """The objects in lines of JSON, blank lines left out; raises ValueError for a line that is no JSON."""
    return [json.loads(line) for line in content.split(b"\n") if line.strip()]


def load_analysis(run: RunDirectory) -> Analysis:
    """The run's analysis; raises RunError if there is none, or one of another version."""
    return parse_analysis(run.read("analysis.json"), run.url)


def parse_analysis(data: bytes, name: str) -> Analysis:
    """An analysis.json of the run `name`; raises RunError for another version, ValueError for what is none."""
    raw: dict[str, Any] = json.loads(data)
    if raw.get("format_version") != ANALYSIS_VERSION:
        raise RunError(
            f"{name}/analysis.json: format_version {raw.get('format_version')!r} is unknown; this version reads "
            f"{ANALYSIS_VERSION}: analyse the run again (jobs/analyze.py --run {name})"
        )
    return Analysis.model_validate(raw)
