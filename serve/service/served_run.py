"""What the HTTP side knows of a run: everything but its models.

A served run answers as one model, of one layer or of several: `ServedRun` is what all its layers share, `ServedLayer`
one of them with its transcoder. The files of a run of one layer lie in its directory, those of each of several in one
below it; one manifest lists them all.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Self

import fsspec

from mtc.config import RunConfig
from mtc.storage import (
    CONTEXTS,
    EMBEDDINGS,
    LABELS,
    WEIGHTS,
    LayerFiles,
    Manifest,
    RunDirectory,
    RunError,
    digest_of,
    layers_of,
)
from serve.contract import ModelIdentity, RunKey, ServiceError
from serve.service.feature_table import AnalysisFiles, FeatureTable
from serve.service.kept import REPORT_FILES, Tables
from serve.service.label_vectors import MOST_BYTES
from serve.service.notes import LayerNotes
from serve.service.storage_reads import OPEN_S, from_storage
from serve.service.tokenising import Tokeniser

ANALYSIS = ("features.parquet", "examples.parquet", "analysis.json")
"""Files of `AnalysisFiles`, in its order."""
LONGEST_HEADER = 100_000_000
"""Most bytes of a safetensors file's header, as the format has it."""
OPEN_TABLES = 4
"""Layers of a run whose analyses are kept in memory, those that were used last: of 30 layers all would be too many."""


class ServedRun:
    """A finished run, opened for answers: what all its layers share. Raises RunError if it can't be read."""

    def __init__(self, key: RunKey):
        self.key = key
        self.directory = RunDirectory(key.url, key.run_id)
        self.manifest = self.directory.manifest()
        self.config: RunConfig = self.directory.config()
        self.tokeniser = Tokeniser(self.config.model)
        # PyTorch comes along, 2 s and 220 MB, which those that only deploy the service do without.
        from mtc.language_model import describe_model

        model = describe_model(self.config.model)
        self.max_positions = model.max_positions
        """Most tokens of a window that the language model has positions for; None if it does not say."""
        self.num_ids = min(self.tokeniser.vocab_size, model.num_ids)
        """Token ids from here on are none, for the tokenizer or for the language model."""
        found = layers_of(self.config)
        identities = identities_of(self.directory, self.manifest, found)
        self.layers = {layer: ServedLayer(self, files, identities[layer]) for layer, files in found.items()}
        """All layers by number, ascending."""
        self.table = Tables(self._open_table, OPEN_TABLES)
        """The analysis of a layer's features, read when it is first asked for; raises as `ServedLayer.analysed`."""

    @property
    def default(self) -> ServedLayer:
        """The layer that answers where none is named: the lowest."""
        return next(iter(self.layers.values()))

    def layer(self, layer: int | None) -> ServedLayer:
        """A layer by its number. Raises ServiceError 422, which names all layers, if there is no such one."""
        if layer is None:
            return self.default
        if layer not in self.layers:
            raise unknown_layer(self.key.run_id, layer, self.layers)
        return self.layers[layer]

    def read(self, name: str) -> bytes:
        """A file of the manifest, checked against it. Raises KeyError for another name, RunError for a damaged file."""
        entry = self.manifest.files[name]
        data = self.directory.read(name)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise RunError(f"{self.key.run_id}: {name} is not what the manifest says")
        return data

    async def report_file(self, name: str) -> bytes:
        """A file of the manifest, kept in memory by its digest. Raises as `read`, and ServiceError 503 while the
        storage fails or hangs."""
        sha256 = self.manifest.files[name].sha256
        content = REPORT_FILES.get(sha256)
        if content is None:
            content = await from_storage(self.read, name, key=("file", sha256))
            REPORT_FILES.put(sha256, content)
        return content

    def _read_vectors(self, name: str) -> bytes:
        """The file of a layer's vectors; raises as `read`, and RunError for one that is too large."""
        if (size := self.manifest.files[name].bytes) > MOST_BYTES:
            raise RunError(f"{name} has {size} bytes, the limit is {MOST_BYTES}: make vectors of fewer dimensions")
        return self.read(name)

    def _open_table(self, layer: int) -> FeatureTable:
        place = self.layers[layer].place
        optional = [LABELS] if place + LABELS in self.manifest.files else []
        names = [place + name for name in (*ANALYSIS, *optional)]
        state = " ".join(self.manifest.files[name].sha256 for name in (place + WEIGHTS, *names))
        features, examples, analysis, *labels = map(self.read, names)
        contexts, vectors = (
            partial(read, place + name) if place + name in self.manifest.files else None
            for name, read in ((CONTEXTS, self.read), (EMBEDDINGS, self._read_vectors))
        )
        files = AnalysisFiles(features, examples, analysis, labels[0] if labels else None, contexts, vectors)
        return FeatureTable((self.key.run_id + f"/{place}").rstrip("/"), state, files)


class ServedLayer:
    """One layer of a served run: its transcoder, and what is known of its features."""

    def __init__(self, run: ServedRun, files: LayerFiles, identity: ModelIdentity):
        self.run, self.identity = run, identity
        self.place, self.config = files
        self.number = identity.layer
        """The layer's number in the language model, from 0."""
        self.notes = LayerNotes(RunDirectory(run.directory.location(self.place).rstrip("/")))
        """What people say of its features."""

    @property
    def run_id(self) -> str:
        """The name that answers have: the run's, or `<its id>/layer9` if that was asked for."""
        return self.identity.run_id

    @property
    def sha256(self) -> str:
        """Digest of the transcoder's weights file."""
        return self.identity.sha256

    @cached_property
    def prefixes(self) -> tuple[int, ...]:
        return self.config.transcoder.prefixes

    @property
    def num_features(self) -> int:
        return self.config.transcoder.num_features

    def named(self, run_id: str) -> Self:
        """The same layer for whoever asked for it by this name."""
        other = copy.copy(self)
        other.identity = self.identity.model_copy(update={"run_id": run_id})
        return other

    @property
    def has_analysis(self) -> bool:
        """Whether there is anything to read of its features."""
        return not self._missing

    @property
    def analysed(self) -> FeatureTable:
        """The analysis of its features, read when it is first asked for.

        Raises ServiceError: 404 if there is none, 409 if it can't be read.
        """
        self._require_analysis()
        try:
            return self.run.table(self.number)
        except (RunError, ValueError) as error:
            message = f"the analysis of {self._words} can't be read: {error}"
            raise ServiceError(409, "run_unusable", message) from error

    async def analysis(self) -> FeatureTable:
        """The same, for whoever must not wait for storage that hangs: also raises ServiceError 503."""
        self._require_analysis()
        known = self.run.table.known(self.number)
        if known is not None:
            return known
        return await from_storage(lambda: self.analysed, key=("table", self.run.key, self.number), seconds=OPEN_S)

    def _require_analysis(self) -> None:
        if missing := self._missing:
            message = f"{self._words} has no analysis of its features (no {', '.join(missing)})"
            raise ServiceError(404, "not_analysed", message)

    @property
    def _missing(self) -> list[str]:
        return [name for name in ANALYSIS if self.place + name not in self.run.manifest.files]

    @property
    def _words(self) -> str:
        where = f"layer {self.number} of " if len(self.run.layers) > 1 else ""
        return f"{where}run {self.run.key.run_id}"


def verified(key: RunKey) -> RunDirectory:
    """The run, whose configuration and weights are whole, and are those that the key names. Raises RunError."""
    run = RunDirectory(key.url, key.run_id)
    layers = layers_of(run.config())
    manifest = run.verify(["config.yaml", *(files.weights for files in layers.values())])
    if (found := digest_of(manifest, layers)) != key.sha256:
        raise RunError(f"{run.url}: the weights have the sha256 {found}, {key.sha256} was asked for")
    return run


def identities_of(run: RunDirectory, manifest: Manifest, layers: Mapping[int, LayerFiles]) -> dict[int, ModelIdentity]:
    """Who each layer's transcoder is, from its configuration and the header of one weights file."""
    first = next(iter(layers.values()))
    d_source, d_target = _widths(run.location(first.weights))  # all layers of a language model are as wide
    found = {}
    for layer, files in layers.items():
        model, transcoder = files.config.model, files.config.transcoder
        found[layer] = ModelIdentity(
            run_id=run.run_id, sha256=manifest.files[files.weights].sha256, base_model=model.name, layer=layer,
            source=model.source, target=model.target, d_source=d_source, d_target=d_target,
            num_features=transcoder.num_features, k=transcoder.k, prefixes=list(transcoder.prefixes),
        )  # fmt: skip
    return found


def unknown_layer(run_id: str, layer: int | None, layers: Iterable[int]) -> ServiceError:
    """422 for a layer that a run has not; names those that it has."""
    there = list(layers)
    words = f"its layers are {', '.join(map(str, there))}" if len(there) > 1 else f"its only layer is {there[0]}"
    message = f"layer={layer}: run {run_id} has no such layer, {words}"
    return ServiceError(422, "unknown_layer", message, {"layers": there, "value": layer})


def _widths(weights: str) -> tuple[int, int]:
    # The header of a safetensors file: its length in 8 bytes, then JSON. The weights themselves stay where they are.
    try:
        with fsspec.open(weights, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            shape = json.loads(json.loads(file.read(min(size, LONGEST_HEADER)))["__metadata__"]["shape"])
        return int(shape["d_source"]), int(shape["d_target"])
    except FileNotFoundError:
        raise RunError(f"{weights} is not there, but the run's manifest names it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{weights} is damaged: it does not begin as a transcoder's weights do") from error
