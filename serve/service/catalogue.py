"""The finished runs that can be served: those beside the run that the service was started with."""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from mtc.config import RunConfig
from mtc.storage import Manifest, RunDirectory, RunError, is_latest, open_run, require_one_layer
from serve.contract import RunKey
from serve.service.served_run import WEIGHTS

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]+(/(?!\.)[A-Za-z0-9._-]+)?")


class Entry(NamedTuple):
    """A finished run of one transcoder."""

    key: RunKey
    manifest: Manifest
    config: RunConfig


class Catalogue:
    """Args: `run` as `Settings.run`: a run, `<root>/latest`, or one transcoder of either."""

    def __init__(self, run: str):
        self._run = RunDirectory(run).url.rstrip("/")  # an address that is none is said as it was given
        above = posixpath.dirname(self._run)
        of_several = is_latest(above) or RunDirectory(above).is_finished()
        self.root = posixpath.dirname(above) if of_several else above

    def served(self) -> Entry:
        """What the service was started with, as it is now. Raises RunError if it can't be served."""
        return _entry(open_run(self._run, verify=False))

    def find(self, run_id: str) -> Entry:
        """A run by its id. Raises RunError if there is none, or it is not finished."""
        if not _NAME.fullmatch(run_id) or run_id == "latest":
            raise RunError(f"{run_id[:200]!r} is not the id of a run")
        run = RunDirectory(posixpath.join(self.root, run_id), run_id)
        if run.manifest().run_id != run_id:
            raise RunError(f"{run.url} holds the run {run.manifest().run_id!r}")
        return _entry(run)

    def entries(self) -> list[Entry]:
        """All finished runs, newest first; directories that hold none are passed over."""
        found: list[Entry] = []
        for name in RunDirectory(self.root).names():
            if not _NAME.fullmatch(name):
                continue
            run = RunDirectory(posixpath.join(self.root, name), name)
            try:
                members = run.members() if run.is_finished() else {}
                found += [self.find(own.run_id) for own in members.values()]
            except (RunError, ValueError):
                continue  # unfinished, damaged, or of a version that this one can't read
        return sorted(found, key=lambda entry: (entry.manifest.created, entry.key.run_id), reverse=True)


def _entry(run: RunDirectory) -> Entry:
    require_one_layer(run)
    manifest = run.manifest()
    if WEIGHTS not in manifest.files:
        raise RunError(f"{run.url} has no {WEIGHTS}")
    key = RunKey(manifest.run_id, run.url, manifest.files[WEIGHTS].sha256, manifest.created)
    return Entry(key, manifest, run.config())
