"""What the HTTP side knows of a run: everything but its models."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import fsspec

from mtc.config import RunConfig
from mtc.storage import RunDirectory, RunError
from serve.contract import ModelIdentity, RunKey, ServiceError
from serve.service.feature_table import AnalysisFiles, FeatureTable
from serve.service.tokenising import Tokeniser

WEIGHTS = "transcoder.safetensors"
ANALYSIS = ("features.parquet", "examples.parquet", "analysis.json")
"""Files of `AnalysisFiles`, in its order."""


class ServedRun:
    """A finished run of one transcoder, opened for answers. Raises RunError if it can't be read."""

    def __init__(self, key: RunKey):
        self.key = key
        self.run = RunDirectory(key.url, key.run_id)
        self.manifest = self.run.manifest()
        self.config: RunConfig = self.run.config()
        self.tokeniser = Tokeniser(self.config.model)
        # PyTorch comes along, 2 s and 220 MB, which those that only deploy the service do without.
        from mtc.language_model import describe_model

        model = describe_model(self.config.model)
        self.max_positions = model.max_positions
        """Most tokens of a window that the language model has positions for; None if it does not say."""
        self.num_ids = min(self.tokeniser.vocab_size, model.num_ids)
        """Token ids from here on are none, for the tokenizer or for the language model."""
        self.identity = identity_of(self.run, self.config, key.sha256)

    @cached_property
    def analysed(self) -> FeatureTable:
        """The analysis of its features, read when it is first asked for.

        Raises ServiceError: 404 if there is none, 409 if it can't be read.
        """
        missing = [name for name in ANALYSIS if name not in self.manifest.files]
        if missing:
            message = f"run {self.key.run_id} has no analysis of its features (no {', '.join(missing)})"
            raise ServiceError(404, "not_analysed", message)
        try:
            return FeatureTable(self.key, AnalysisFiles(*map(self.read, ANALYSIS)))
        except (RunError, ValueError) as error:
            message = f"the analysis of run {self.key.run_id} can't be read: {error}"
            raise ServiceError(409, "run_unusable", message) from error

    def read(self, name: str) -> bytes:
        """A file of the manifest, checked against it. Raises KeyError for another name, RunError for a damaged file."""
        entry = self.manifest.files[name]
        data = self.run.read(name)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise RunError(f"{self.key.run_id}: {name} is not what the manifest says")
        return data

    @cached_property
    def prefixes(self) -> tuple[int, ...]:
        return self.config.transcoder.prefixes

    @property
    def num_features(self) -> int:
        return self.config.transcoder.num_features


def identity_of(run: RunDirectory, config: RunConfig, sha256: str) -> ModelIdentity:
    """Who a run's transcoder is, from its configuration and the header of its weights."""
    d_source, d_target = _widths(run)
    model, transcoder = config.model, config.transcoder
    return ModelIdentity(
        run_id=run.run_id, sha256=sha256, base_model=model.name, layer=model.layer, source=model.source,
        target=model.target, d_source=d_source, d_target=d_target, num_features=transcoder.num_features,
        k=transcoder.k, prefixes=list(transcoder.prefixes),
    )  # fmt: skip


def _widths(run: RunDirectory) -> tuple[int, int]:
    # The header of a safetensors file: its length in 8 bytes, then JSON. The weights themselves stay where they are.
    with fsspec.open(run.location(WEIGHTS), "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        shape = json.loads(json.loads(file.read(size))["__metadata__"]["shape"])
    return int(shape["d_source"]), int(shape["d_target"])
