"""The language model with its MLPs taken apart into what a run's transcoders say of them: features, skip and error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from torch import Tensor

from mtc import language_model
from mtc.config import ModelConfig
from mtc.errors import MtcError
from mtc.language_model import PackedWindows, load_tokenizer, pack_windows
from mtc.language_model.frozen import Frozen
from mtc.language_model.mlps import Sources
from mtc.storage import RunDirectory, load_analysis, open_run, read_features
from mtc.text import TokenTexts, encode_text, special_ids
from mtc.transcoder import MatryoshkaTranscoder, load_transcoder

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages, each with a role and a content."""


class CircuitError(MtcError, ValueError):
    """A circuit can't be traced, or an intervention made; the message names the argument, the limit and the value."""


class ReplacementModel:
    """A whole language model and the transcoders of some of its layers, for graphs and interventions.

    Layers without a transcoder keep their MLP as it is: in a graph all that it writes is error.
    """

    def __init__(
        self,
        model: language_model.LanguageModel,
        transcoders: dict[int, MatryoshkaTranscoder],
        tokenizer: Any,
        run: RunDirectory | None = None,
        sources: Mapping[int, str] | None = None,
        places: dict[int, RunDirectory] | None = None,
    ):
        """`transcoders` by layer, `sources` the sites that they read, by default resid_mid; `run` is where they come
        from, `places` where the files of each lie."""
        self.model, self.transcoders, self.tokenizer, self.run = model, transcoders, tokenizer, run
        self.places = places or {}
        self._known: dict[int, dict[int, tuple[int | None, str | None]]] = {}
        self.sources = {**dict.fromkeys(transcoders, "resid_mid"), **(sources or {})}
        self.texts = TokenTexts(tokenizer)
        self.special = special_ids(tokenizer)
        """Token ids that stand for no text."""
        self.ends = model.ends | ({tokenizer.eos_token_id} - {None})
        """Token ids that end a text."""

    @classmethod
    def load(cls, run: str | RunDirectory, device: str | torch.device = "cpu") -> ReplacementModel:
        """The whole language model in float32, and all transcoders of a finished run, of one layer or of several.

        Raises RunError like `open_run`, ModelError and ConfigError like `LanguageModel`, CircuitError for a sweep,
        which has several transcoders for a layer: name one of them.
        """
        run = open_run(run) if isinstance(run, str) else run
        config = run.config()
        if config.sweep:
            names = ", ".join(own.url for own in run.members().values())
            raise CircuitError(f"{run.url} is a sweep, with several transcoders for a layer; name one of them: {names}")
        # Compiled parts know no frozen factors.
        about: ModelConfig = config.model.model_copy(update={"dtype": "float32", "compile": False})
        layers = [member.config.model for member in config.members()]
        places = {own.layer: place for own, place in zip(layers, run.members().values(), strict=True)}
        transcoders = {layer: load_transcoder(place, device) for layer, place in places.items()}
        sources = {own.layer: own.source for own in layers}
        model = language_model.LanguageModel(about, device, full=True)
        return cls(model, transcoders, load_tokenizer(config.model), run, sources, places)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries that all layers have."""
        shared = set.intersection(*(set(each.prefixes) for each in self.transcoders.values()))
        return tuple(sorted(shared))

    def window(self, prompt: Prompt) -> PackedWindows:
        """A prompt as one window: text, with BOS in front where the tokenizer has one; chat messages; or token ids as
        they are.

        Raises CircuitError for an empty prompt, unknown ids, more tokens than the model has positions, and messages
        that the model has no template for.
        """
        ids = np.asarray(self.token_ids(prompt), np.int64).reshape(-1)
        limit = self.model.vocab_size
        if len(ids) and not (ids.min() >= 0 and ids.max() < limit):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise CircuitError(f"prompt has the token id {wrong}: 0 to {limit - 1} are wanted")
        window = pack_windows([ids.astype(np.int32)], self.special)
        if not bool(window.trainable.any()):
            raise CircuitError("prompt has no token but special ones: a word at least is wanted")
        most = self.model.max_tokens
        if most is not None and len(ids) > most:
            raise CircuitError(f"prompt has {len(ids)} tokens, the model has {most} positions")
        return window

    def token_ids(self, prompt: Prompt) -> Sequence[int]:
        """The ids of `window`, however many. Raises CircuitError for messages that the model has no template for."""
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token_id
            return [*([] if bos is None else [bos]), *encode_text(prompt, self.tokenizer).ids.tolist()]
        if not any(isinstance(part, Mapping) for part in prompt):
            return prompt  # type: ignore[return-value]
        if not getattr(self.tokenizer, "chat_template", None):
            raise CircuitError(f"prompt is chat messages, and {self.model.config.name} has no chat template")
        names = [self.texts.token(i) for i in self.special]
        for number, message in enumerate(prompt):
            fields = message if isinstance(message, Mapping) else {}
            text = fields.get("content")
            if not isinstance(text, str) or not isinstance(fields.get("role"), str):
                raise CircuitError(f"prompt[{number}] is no message with a role and a content")
            if spelled := next((name for name in names if name and name in text), None):
                raise CircuitError(f"prompt[{number}].content spells the special token {spelled}")
        try:
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # such as roles that do not alternate
            raise CircuitError(f"prompt: the model's chat template refuses these messages: {error}") from None
        # The template spells BOS where the model wants it; what it spells are special tokens, so the tokenizer that
        # reads them as plain text does not do.
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = False
        return list(backend.encode(text, add_special_tokens=False).ids)

    def strings(self, token_ids: Sequence[int]) -> list[str]:
        """What each token of a window adds to its text; special ones by name."""
        ids, bos = list(token_ids), self.tokenizer.bos_token_id
        first = 1 if ids and ids[0] == bos else 0
        return [self.texts.token(i) for i in ids[:first]] + self.texts.sequence(ids[first:], starts_text=True)

    def read_features(self) -> None:
        """Read what the run's analysis knows of features, so that a wrong one is told before any work. Raises RunError
        for an analysis of another version, whose features have no labels."""
        for layer in self.transcoders:
            self._analysed(layer)

    def about(self, layer: int, feature: int) -> dict[str, Any]:
        """What the run's analysis knows of a feature, as fields of a GraphNode: the group it is in, its ancestors and
        its label."""
        groups = self.transcoders[layer].groups
        group = next(n for n, (_, end) in enumerate(groups) if feature < end)
        _, label = self._analysed(layer).get(feature, (None, None))
        return {"group": group, "ancestors": self.ancestors(layer, feature), "text": label}

    def ancestors(self, layer: int, feature: int) -> tuple[int, ...]:
        """The earlier features that a feature refines, by the analysis's tree: its parent first, then that one's."""
        known, found = self._analysed(layer), [feature]
        while (parent := known.get(found[-1], (None, None))[0]) is not None and parent < found[-1]:
            found.append(parent)
        return tuple(found[1:])

    def _analysed(self, layer: int) -> dict[int, tuple[int | None, str | None]]:
        """Parent and label of each feature of a layer; empty where the run has no analysis."""
        if layer not in self._known:
            place = self.places.get(layer)
            self._known[layer] = _read_features(place) if place and place.exists("features.parquet") else {}
        return self._known[layer]

    def check_prefix(self, prefix: int | None) -> int | None:
        """Raises CircuitError if not all layers have such a nested dictionary."""
        if prefix is not None and prefix not in self.prefixes:
            raise CircuitError(f"prefix={prefix} is not one of the nested dictionaries {list(self.prefixes)}")
        return prefix

    def source(self, layer: int, sources: Sources) -> Tensor:
        """What the layer's transcoder reads, [tokens, d_source]."""
        return sources.mlp_in if self.sources[layer] == "mlp_in" else sources.resid_mid


def _read_features(place: RunDirectory) -> dict[int, tuple[int | None, str | None]]:
    load_analysis(place)  # raises RunError for another version
    columns = ["feature", "parent", "label"]
    table = read_features(place, columns)
    return {row["feature"]: (row["parent"] and row["parent"]["feature"], row["label"]) for row in table.to_pylist()}


class Taken(NamedTuple):
    """What one layer's MLP writes for one window, taken apart; dtype of the model's pass.

    mlp_out = what features write + skip + constant + error. Special tokens, which no transcoder is trained on, are all
    error.
    """

    token: Tensor
    """[entries] int64, non-decreasing: tokens of the active features."""
    feature: Tensor
    """[entries] int64, ascending within a token."""
    activation: Tensor
    """[entries], their activations, which are pre-activations above the threshold."""
    W_enc: Tensor
    """[features, d_source]"""
    b_enc: Tensor
    """[features]"""
    W_dec: Tensor
    """[features, d_target], in scaled units."""
    W_skip: Tensor | None
    """[d_target, d_source], to scaled units; reads sources times `factor`."""
    scale: Tensor
    """Scalar that scaled units are divided by."""
    factor: Tensor
    """[tokens, 1], what sources are multiplied with before W_enc and W_skip."""
    trained: Tensor
    """[tokens, 1], 1 where the token is not special, else 0."""
    constant: Tensor
    """[tokens, d_target], the decoder's bias."""
    error: Tensor
    """[tokens, d_target]"""

    def skipped(self, source: Tensor) -> Tensor:
        """What the skip connection writes for sources [tokens, d_source]; linear, since `factor` is held."""
        if self.W_skip is None:
            return torch.zeros_like(self.error)
        return (source * self.factor * self.trained) @ self.W_skip.T / self.scale

    def directions(self, feature: Tensor) -> Tensor:
        """[n, d_target], what one unit of these features' activations writes."""
        return self.W_dec[feature] / self.scale

    def written(self, chosen: Tensor) -> Tensor:
        """What some of the entries write, [tokens, d_target]; `chosen` is [entries] bool."""
        rows = self.activation[chosen, None] * self.directions(self.feature[chosen])
        return torch.zeros_like(self.error).index_add_(0, self.token[chosen], rows)

    def pre_activations(self, source: Tensor, token: Tensor, feature: Tensor) -> Tensor:
        """[n] of these features at these tokens, for sources [tokens, d_source]; linear but for b_enc."""
        return ((source * self.factor)[token] * self.W_enc[feature]).sum(1) + self.b_enc[feature]


@torch.no_grad()
def take_apart(model: ReplacementModel, frozen: Frozen, window: PackedWindows, prefix: int | None) -> dict[int, Taken]:
    """The MLPs that have a transcoder, by layer; with `prefix`, only features of that nested dictionary."""
    found = {}
    for layer, transcoder in sorted(model.transcoders.items()):
        source, target = model.source(layer, frozen.real.sources[layer]), frozen.real.mlp_out[layer]
        trained = window.trainable.to(source.device)
        codes = transcoder.encode_sparse(source.float(), prefix=prefix)
        kept = trained[codes.token]
        own = {name: value.to(source.dtype) for name, value in transcoder.state_dict().items()}
        factor, scale = transcoder.input_factor(source), own["target_scale"]
        taken = Taken(
            token=codes.token[kept],
            feature=codes.feature[kept],
            activation=source.new_empty(0),
            W_enc=own["W_enc"],
            b_enc=own["b_enc"],
            W_dec=own["W_dec"],
            W_skip=own.get("W_skip"),
            scale=scale,
            factor=source.new_ones(len(source), 1) if factor is None else factor.expand(len(source), 1),
            trained=trained[:, None].to(source.dtype),
            constant=trained[:, None] * (own["b_dec"] / scale),
            error=torch.zeros_like(target),
        )
        taken = taken._replace(activation=taken.pre_activations(source, taken.token, taken.feature))
        explained = taken.written(torch.ones_like(taken.token, dtype=torch.bool))
        found[layer] = taken._replace(error=target - explained - taken.skipped(source) - taken.constant)
    return found
