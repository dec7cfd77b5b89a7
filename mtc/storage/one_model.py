"""What makes a finished run one model, which can be served and promoted: one layer or several, each with weights.

The files of a run of one layer lie in its directory, those of each of several in one below it; one manifest lists them
all. The transcoders of a sweep share a layer, so that each is a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mtc.config import RunConfig
from mtc.storage.index import weights_digest
from mtc.storage.runs import Manifest, RunDirectory, RunError, require_one_layer

WEIGHTS = "transcoder.safetensors"


class SweepError(RunError):
    """A run whose transcoders share a layer, so that each is a model of its own; `members` are their ids."""

    def __init__(self, message: str, members: Sequence[str] = ()):
        super().__init__(message)
        self.members = members


class LayerFiles(NamedTuple):
    """One layer of a finished run."""

    place: str
    """What the names of its files begin with in the run's manifest: nothing, or of several layers `layer9/`."""
    config: RunConfig
    """Configuration of its transcoder, as if it were the run's only one."""

    @property
    def weights(self) -> str:
        return self.place + WEIGHTS


class OneModel(NamedTuple):
    """A finished run that answers as one model."""

    manifest: Manifest
    config: RunConfig
    layers: dict[int, LayerFiles]
    """By number, ascending."""
    digest: str
    """Of its weights, see `digest_of`."""


def as_one_model(run: RunDirectory) -> OneModel:
    """A finished run as one model. Raises RunError if it can't be read or lacks weights, SweepError for a sweep."""
    config = run.config()
    if config.sweep:
        try:
            require_one_layer(run)
        except RunError as error:
            raise SweepError(str(error), [own.run_id for own in run.members().values()]) from None
    manifest, layers = run.manifest(), layers_of(config)
    return OneModel(manifest, config, layers, digest_of(manifest, layers))


def layers_of(config: RunConfig) -> dict[int, LayerFiles]:
    """The layers of a run that is no sweep by number, ascending."""
    members = sorted(config.members(), key=lambda member: member.config.model.layer)
    several = len(members) > 1
    return {own.model.layer: LayerFiles(f"{name}/" if several else "", own) for name, own in members}


def digest_of(manifest: Manifest, layers: Mapping[int, LayerFiles]) -> str:
    """Digest of a run's weights: of the file of one layer, or of the digests of all layers' files.

    Raises RunError if the manifest lacks one of these.
    """
    for files in layers.values():
        if files.weights not in manifest.files:
            raise RunError(f"run {manifest.run_id} has no {files.weights}")
    return weights_digest([manifest.files[files.weights].sha256 for files in layers.values()])
