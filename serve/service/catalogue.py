"""The finished runs that can be served: those beside the run that the service was started with."""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mtc.config import RunConfig
from mtc.errors import MtcError, one_line
from mtc.storage import (
    ALIASES,
    IndexedModel,
    LayerFiles,
    Manifest,
    RunDirectory,
    RunError,
    SweepError,
    as_one_model,
    finished_runs,
    is_alias,
    is_hub_url,
    is_latest,
    last_known,
    open_run,
)
from serve.contract import Problem, RunKey
from serve.service.served_run import verified

logger = logging.getLogger("ray.serve")

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]+(/(?!\.)[A-Za-z0-9._-]+)?")
_PLACE = re.compile(r"""(?:\w[\w+.-]*://|(?<![\w.])~?/)[^\s'"]*[^\s'",;:.)\]]""")
"""A URL or an absolute path."""
_LONGEST = 400
"""Characters of a reason that are repeated."""

UNUSABLE = (MtcError, OSError, ValueError)
"""What a run that is missing, damaged or out of reach raises."""


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
    """Args: `run` as `Settings.run`: a run, `<root>/latest`, an alias, or one transcoder of these. One of the Hugging
    Face hub stands alone: other repositories hold other things."""

    def __init__(self, run: str):
        self._run = RunDirectory(run).url.rstrip("/")  # an address that is none is said as it was given
        self.alone = is_hub_url(self._run)
        if self.alone:
            self.root, self.name = self._run, posixpath.basename(self._run)
            return
        above = posixpath.dirname(self._run)
        of_several = is_latest(above) or RunDirectory(above).is_finished() or is_alias(above)
        self.root = posixpath.dirname(above) if of_several else above
        self.name = self._run.removeprefix(self.root).strip("/")
        """What is served, as it is called beside the runs: `production`, `latest/layer9`, a run's id."""

    def served(self) -> Entry:
        """What the service was started with, as it is now. Raises RunError if it can't be served, SweepError for a
        sweep."""
        return _entry(open_run(self._run, verify=False))

    def usable(
        self, verify: bool = True, failed: Mapping[RunKey, Problem] = MappingProxyType({})
    ) -> tuple[Entry, str | None]:
        """What answers at a start: what the service was started with, or else, with the reason, the last run of that
        name that can be served.

        Of an alias that is the one that had the name before, and so on; what was taken back comes last. Of `latest` it
        is the newest finished run. A run by its own name has none in its place. `failed` are runs that could not be
        loaded, and why. With `verify`, the weights of what is taken are checked. Raises one of UNUSABLE, what is wrong
        with the name itself, if there is none.
        """
        broken, error = set(failed), None
        try:
            entry = self.served()
            if entry.key in failed:
                raise RunError(failed[entry.key].shown)
            others = self._others() if verify else []
            if others:
                broken.add(entry.key)
                verified(entry.key)
            return entry, None
        except UNUSABLE as reason:
            error = reason
        for run_id in self._others():
            try:
                entry = self.find(run_id)
                if entry.key not in broken:
                    if verify:
                        verified(entry.key)
                    logger.error("%s can't be served: %s", self.name, one_line(error))
                    return entry, self.words(Problem.of(error))
            except UNUSABLE:
                continue
        raise error

    def words(self, problem: Problem) -> str:
        """Why what is served can't be, in one line for all who may ask: without places, but for those in a run."""
        first = next(iter(problem.shown.strip().splitlines()), "")
        bare = self.root.partition("://")[2] or self.root  # so an object store's library has it
        for root in (self.root, f"file://{bare}", bare):
            if root.strip("/"):
                root = re.escape(root.rstrip("/"))
                first = re.sub(rf"(?<![\w./-]){root}/", "", first)
                first = re.sub(rf"(?<![\w./-]){root}(?![\w-])", "...", first)
        return f"{self.name} can't be served: {_PLACE.sub('...', first)[:_LONGEST]}"

    def find(self, run_id: str) -> Entry:
        """A run by its id. Raises RunError if there is none, or it is not finished, SweepError for a sweep."""
        if not _NAME.fullmatch(run_id) or run_id in ("latest", ALIASES):
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

    def _others(self) -> list[str]:
        """Ids of the runs that can take the place of what is served, the best one first; none of what can't be read."""
        name, _, member = self.name.partition("/")
        whole = posixpath.join(self.root, name)
        try:
            if not self.alone and name == "latest" and is_latest(whole):
                found = [entry.key.run_id for entry in self.entries()]
                found = [run_id.partition("/")[0] for run_id in found if member or "/" not in run_id]
            elif not self.alone and is_alias(whole):
                alias = last_known(self.root, name)
                had = [move.run_id for move in reversed(alias.history)] if alias else []
                found = [alias.run_id, *alias.before(), *had] if alias else []
            else:
                return []
        except UNUSABLE:
            return []
        return [f"{run_id}/{member}" if member else run_id for run_id in dict.fromkeys(found)]

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
    manifest, config, layers, digest = as_one_model(run)
    return Entry(RunKey(manifest.run_id, run.url, digest, manifest.created), manifest, config, layers)
