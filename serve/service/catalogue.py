"""The finished runs that can be served: those beside the run that the service was started with."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import NamedTuple

from mtc.config import RunConfig
from mtc.storage import (
    IndexedModel,
    Manifest,
    RunDirectory,
    RunError,
    finished_runs,
    is_hub_url,
    is_latest,
    open_run,
    require_one_layer,
)
from serve.contract import RunKey
from serve.service.served_run import LayerFiles, digest_of, layers_of

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]+(/(?!\.)[A-Za-z0-9._-]+)?")


class SweepError(RunError):
    """A run whose transcoders share a layer, so that each is a model of its own; `members` are their ids."""

    def __init__(self, message: str, members: Sequence[str] = ()):
        super().__init__(message)
        self.members = members


class Listed(NamedTuple):
    """What a list says of a run that answers as one model, of one layer or of several."""

    key: RunKey
    base_model: str
    """The language model whose activations it reads."""
    layers: list[int]
    """Numbers of its layers, ascending."""
    num_features: int
    """Size of the dictionary of each layer."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    k: int
    """Active features per token on average, as trained."""


class Entry(NamedTuple):
    """A finished run that answers as one model, with what it was read from."""

    key: RunKey
    manifest: Manifest
    config: RunConfig
    layers: dict[int, LayerFiles]
    """By number, ascending."""

    @property
    def listed(self) -> Listed:
        model, transcoder = self.config.model, self.config.transcoder
        prefixes = list(transcoder.prefixes)
        return Listed(self.key, model.name, list(self.layers), transcoder.num_features, prefixes, transcoder.k)


class Catalogue:
    """Args: `run` as `Settings.run`: a run, `<root>/latest`, or one transcoder of either. One of the Hugging Face hub
    stands alone: other repositories hold other things."""

    def __init__(self, run: str):
        self._run = RunDirectory(run).url.rstrip("/")  # an address that is none is said as it was given
        self.alone = is_hub_url(self._run)
        if self.alone:
            self.root = self._run
            return
        above = posixpath.dirname(self._run)
        of_several = is_latest(above) or RunDirectory(above).is_finished()
        self.root = posixpath.dirname(above) if of_several else above

    def served(self) -> Entry:
        """What the service was started with, as it is now. Raises RunError if it can't be served, SweepError for a
        sweep."""
        return _entry(open_run(self._run, verify=False))

    def find(self, run_id: str) -> Entry:
        """A run by its id. Raises RunError if there is none, or it is not finished, SweepError for a sweep."""
        if not _NAME.fullmatch(run_id) or run_id == "latest":
            raise RunError(f"{run_id[:200]!r} is not the id of a run")
        run = RunDirectory(self._place(run_id), run_id)
        if run.manifest().run_id != run_id:
            raise RunError(f"{run.url} holds the run {run.manifest().run_id!r}")
        return _entry(run)

    def entries(self) -> list[Listed]:
        """All finished runs, newest first, of a sweep each transcoder; directories that hold none are passed over."""
        if self.alone:
            found = [entry.listed for entry in self._entries(self.served().key.run_id)]
        else:
            runs = finished_runs(self.root).values()
            found = [self._listed(model) for run in runs for model in run.models]
        return sorted(found, key=lambda listed: (listed.key.created, listed.key.run_id), reverse=True)

    def _listed(self, model: IndexedModel) -> Listed:
        key = RunKey(model.run_id, posixpath.join(self.root, model.run_id), model.sha256, model.created)
        return Listed(key, model.base_model, model.layers, model.num_features, model.prefixes, model.k)

    def _place(self, run_id: str) -> str:
        """Where a run of this id lies if it is there."""
        if not self.alone:
            return posixpath.join(self.root, run_id)
        own = RunDirectory(self._run).manifest().run_id
        if not f"{run_id}/".startswith(f"{own}/"):
            raise RunError(f"{self._run} holds the run {own!r} and no {run_id!r}")
        return self._run + run_id.removeprefix(own)

    def _entries(self, run_id: str) -> list[Entry]:
        try:
            return [self.find(run_id)]
        except SweepError as sweep:
            return [entry for member in sweep.members for entry in self._entries(member)]
        except (RunError, ValueError):
            return []  # unfinished, damaged, or of a version that this one can't read


def _entry(run: RunDirectory) -> Entry:
    config = run.config()
    if config.sweep:
        try:
            require_one_layer(run)
        except RunError as error:
            raise SweepError(str(error), [own.run_id for own in run.members().values()]) from None
    manifest, layers = run.manifest(), layers_of(config)
    key = RunKey(manifest.run_id, run.url, digest_of(manifest, layers), manifest.created)
    return Entry(key, manifest, config, layers)
