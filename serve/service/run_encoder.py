"""Tokens to features: a finished run's language model and the transcoders of its layers, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from mtc.config import ModelConfig
from mtc.devices import choose_bfloat16, open_device
from mtc.language_model import LanguageModel, SitePair, load_tokenizer, pack_windows
from mtc.storage import RunDirectory, layers_of
from mtc.text import special_ids
from mtc.transcoder import Codes, MatryoshkaTranscoder, load_transcoder
from serve.contract import Encoded, Options

SEARCH_TOKENS = 256
"""Where CPUs multiply bfloat16 fast, a search with rounded weights pays from here on: rounding them costs the same for
any number of tokens."""

_building = threading.Lock()
"""Two runs that are loaded at once and share a model load it once."""
_models: WeakValueDictionary[tuple[str, str], LanguageModel] = WeakValueDictionary()
_passes: WeakKeyDictionary[LanguageModel, threading.Lock] = WeakKeyDictionary()
"""Of each model one forward pass at a time: it is watched by hooks on the model, which would see another thread's pass
as well, such as the warm-up of a run that shares the model."""


class RunEncoder:
    """The language model, cut off after the run's highest layer, with the transcoder of each of its layers.

    Runs that read the same sites of the same model share it. Special tokens have no features.
    """

    def __init__(self, run: RunDirectory, device: str = "cpu"):
        config, on = run.config(), open_device(device)
        self._special = sorted(special_ids(load_tokenizer(config.model)))
        self._model = _language_model(config.model, on)
        self._one_at_a_time = _passes.setdefault(self._model, threading.Lock())
        places = {run.location(files.place).rstrip("/"): layer for layer, files in layers_of(config).items()}
        self.transcoders = {
            layer: load_transcoder(RunDirectory(place), on).requires_grad_(False) for place, layer in places.items()
        }
        """Transcoders by layer, ascending."""
        self._numbers = {sites.layer: number for number, sites in enumerate(config.model.sites)}
        """Where each layer stands among those that the language model is read at."""
        self._bfloat16_search = device == "cpu" and choose_bfloat16("auto", on)

    def warm_up(self, max_tokens: int) -> str:
        """Compile and set up what batches of up to `max_tokens` tokens take, so that no request waits for it.

        Returns how the language model runs from here on, as `LanguageModel.compute` tells it.
        """
        with self._one_at_a_time:
            self._model.warm_up(max_tokens)
        for length in (1, 16):  # lengths differ in what they set up
            packed = pack_windows([np.zeros(length, np.int32)], self._special)
            with torch.inference_mode():
                with self._one_at_a_time:
                    pairs = self._model.capture(packed)
                for layer, number in self._numbers.items():
                    pair, trainable = pairs[number], packed.trainable.numpy()
                    _features(self.transcoders[layer], self._search(pair), pair, trainable, None, True)
        return self._model.compute

    def encode_batch(self, windows: Sequence[NDArray[np.int32]], options: Sequence[Options]) -> list[Encoded]:
        """Features of windows of token ids, one [tokens] and one `Options` each, from one forward pass that ends behind
        the highest layer that any of them wants."""
        packed = pack_windows(windows, self._special)
        starts = np.cumsum([0, *packed.lengths])
        results: dict[int, Encoded] = {}
        wanted = [(next(iter(self.transcoders)) if each.layer is None else each.layer, each.prefix) for each in options]
        layers = sorted({layer for layer, _ in wanted})
        with torch.inference_mode():
            with self._one_at_a_time:
                pairs = self._model.capture(packed, at=[self._numbers[layer] for layer in layers])
            of_layer = dict(zip(layers, pairs, strict=True))
            for layer, prefix in set(wanted):
                # One product for all windows that want the same nested dictionary of the same layer.
                pair, chosen = of_layer[layer], [i for i, each in enumerate(wanted) if each == (layer, prefix)]
                rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])
                index = torch.from_numpy(rows).to(pair.source.device)
                part = pair if len(chosen) == len(windows) else type(pair)(*(site[index] for site in pair))
                trainable = packed.trainable.numpy()[rows]
                ends = np.cumsum([packed.lengths[i] for i in chosen])
                errors = any(options[i].relative_error for i in chosen)
                found = _features(self.transcoders[layer], self._search(part), part, trainable, prefix, errors)
                for i, end in zip(chosen, ends, strict=True):
                    results[i] = found.of_window(int(end - packed.lengths[i]), int(end), options[i])
        return [results[i] for i in range(len(windows))]

    def reconstruct(
        self, layer: int, tokens: int, token: NDArray[np.int64], feature: NDArray[np.int64],
        value: NDArray[np.float32], prefix: int | None,
    ) -> NDArray[np.float32]:  # fmt: skip
        """A layer's raw reconstruction [tokens, d_target] from entries; those beyond the prefix are left out.

        Raises ValueError for a transcoder with a skip connection: it needs activations that no features tell.
        """
        transcoder = self.transcoders[layer]
        order = np.argsort(token, kind="stable")
        kept = order[feature[order] < (prefix or transcoder.num_features)]
        device = transcoder.W_dec.device
        entries = [torch.from_numpy(part[kept]).to(device) for part in (token, feature, value)]
        with torch.inference_mode():
            return _numpy(transcoder.decode_codes(Codes(tokens, *entries))[-1])

    def _search(self, pair: SitePair) -> bool:
        """Whether so many tokens are searched with rounded weights."""
        return self._bfloat16_search and len(pair.source) >= SEARCH_TOKENS


def _features(
    transcoder: MatryoshkaTranscoder, search: bool, pair: SitePair, trainable: NDArray[np.bool_], prefix: int | None,
    relative_error: bool,
) -> _Features:  # fmt: skip
    codes = transcoder.encode_sparse(pair.source, search, prefix)
    token, feature, value = map(_numpy, (codes.token, codes.feature, codes.value))
    kept = trainable[token]
    error = _relative_error(transcoder, pair, codes, prefix, trainable) if relative_error else None
    return _Features(token[kept], feature[kept].astype(np.int32), value[kept], error)


def _relative_error(
    transcoder: MatryoshkaTranscoder, pair: SitePair, codes: Codes, prefix: int | None, trainable: NDArray[np.bool_]
) -> NDArray[np.float32]:
    which = transcoder.prefixes.index(prefix or transcoder.num_features)
    y = pair.target.float()
    reconstruction = transcoder.decode_codes(codes, pair.source)[which]
    deviation = (y - transcoder.b_dec / transcoder.target_scale).square().sum(1)
    ratio = _numpy((y - reconstruction).square().sum(1) / deviation.clamp(min=1e-30))
    return np.where(trainable, ratio, np.float32(np.nan))


class _Features:
    """Active entries of a batch, token by token, features ascending within each."""

    def __init__(
        self, token: NDArray[np.int64], feature: NDArray[np.int32], value: NDArray[np.float32],
        errors: NDArray[np.float32] | None,
    ):  # fmt: skip
        self._token, self._feature, self._value, self._errors = token, feature, value, errors

    def of_window(self, start: int, end: int, options: Options) -> Encoded:
        """The tokens from `start` to `end`, as the options want them."""
        a, b = np.searchsorted(self._token, (start, end))
        token, feature, value = self._token[a:b] - start, self._feature[a:b], self._value[a:b]
        tokens = end - start
        l0 = np.bincount(token, minlength=tokens).astype(np.int32) if options.l0 else None
        relative_error = None if self._errors is None or not options.relative_error else self._errors[start:end]
        wanted = value >= np.float64(options.min_activation)  # which may be beyond float32
        if options.features is not None:
            wanted &= np.isin(feature, np.array(options.features))
        if not wanted.all():
            token, feature, value = token[wanted], feature[wanted], value[wanted]
        if options.top_k is not None or not options.by_index:
            order = np.lexsort((feature, -value, token))
            if options.top_k is not None:
                first = np.searchsorted(token, np.arange(tokens))
                order = order[np.arange(len(order)) - first[token] < options.top_k]
            if options.by_index:
                order = np.sort(order)  # entries came by index
            token, feature, value = token[order], feature[order], value[order]
        indptr = np.searchsorted(token, np.arange(tokens + 1)).astype(np.int64)
        return Encoded(indptr, feature, value, l0, relative_error)


def _language_model(config: ModelConfig, device: torch.device) -> LanguageModel:
    key = (config.model_dump_json(), str(device))
    with _building:
        model = _models.get(key)
        if model is None:
            model = _models[key] = LanguageModel(config, device=device)
    return model


def _numpy(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
