"""Text to features: a finished run's language model and transcoder, alone (`RunEncoder`) and as a Serve deployment."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from ray import serve as ray_serve

from mtc.runs import RunDirectory, load_transcoder, open_run
from serve.schemas import FeatureActivation, TextResult, TokenFeatures

if TYPE_CHECKING:
    from torch import Tensor


MAX_BATCH_TEXTS = 16
MAX_BATCH_TOKENS = 4096


class TextTooLongError(ValueError):
    """An input has more tokens than the service takes."""

    def __init__(self, index: int, tokens: int, limit: int):
        super().__init__(index, tokens, limit)  # all arguments, so that the error survives pickling
        self.index, self.tokens, self.limit = index, tokens, limit

    def __str__(self) -> str:
        return f"inputs[{self.index}] has {self.tokens} tokens, more than max_input_tokens={self.limit}"


class Window(NamedTuple):
    """One text, ready for the forward pass."""

    token_ids: list[int]
    """BOS first where the tokenizer has one, as in training."""
    top_k: int
    """Features wanted for each token."""
    prefix: int | None
    """Nested dictionary to use, or all features."""


class RunEncoder:
    """The language model, cut off after the run's layer, with the run's transcoder behind it.

    `max_input_tokens` is a wish: the model's own number of positions is a limit too.
    """

    def __init__(self, run: RunDirectory, max_input_tokens: int = 1024, device: str = "cpu"):
        from mtc.language_model import LanguageModel
        from mtc.model_files import load_tokenizer
        from mtc.tokens import special_ids

        config = run.config()
        self._tokenizer = load_tokenizer(config.model)
        self._special = set(special_ids(self._tokenizer))
        self._model = LanguageModel(config.model, device=device)
        self._transcoder = load_transcoder(run, device)
        model_config: Any = self._model.model.config
        positions = getattr(model_config.get_text_config(), "max_position_embeddings", max_input_tokens)
        self.max_input_tokens = min(max_input_tokens, positions)

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """Token ids as in training: text never becomes a special token. Raises TextTooLongError."""
        bos = self._tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        windows = []
        for index, text in enumerate(texts):
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            window = start + ids
            if len(window) > self.max_input_tokens:
                raise TextTooLongError(index, len(window), self.max_input_tokens)
            windows.append(window)
        return windows

    def encode(self, texts: list[str], top_k: int = 16, prefix: int | None = None) -> list[TextResult]:
        """The strongest `top_k` active features of every token of every text."""
        return self.encode_windows([Window(ids, top_k, prefix) for ids in self.tokenise(texts)])

    def encode_windows(self, windows: list[Window]) -> list[TextResult]:
        """Encode windows of any lengths in as few forward passes of at most MAX_BATCH_TOKENS tokens as fit."""
        results: dict[int, TextResult] = {}
        for chunk in _chunks([len(w.token_ids) for w in windows]):
            chosen = [windows[i] for i in chunk]
            results.update(zip(chunk, self._forward(chosen), strict=True))
        return [results.get(i, TextResult(tokens=[])) for i in range(len(windows))]

    def _forward(self, windows: list[Window]) -> list[TextResult]:
        import numpy as np
        import torch

        from mtc.work import pack_windows

        packed = pack_windows([np.array(w.token_ids, np.int32) for w in windows], sorted(self._special))
        with torch.inference_mode():
            (pair,) = self._model.capture(packed)
            sources = pair.source.split(list(packed.lengths))
            return [
                self._text_result(window, self._transcoder.encode(source, window.prefix))
                for window, source in zip(windows, sources, strict=True)
            ]

    def _text_result(self, window: Window, activations: Tensor) -> TextResult:
        """One text's answer from its activations [tokens, features]."""
        strongest = _strongest(activations.cpu(), window.top_k)
        tokens = []
        for token_id, features in zip(window.token_ids, strongest, strict=True):
            special = token_id in self._special
            tokens.append(
                TokenFeatures(
                    token_id=token_id,
                    token=str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)),
                    is_special=special,
                    features=[] if special else features,
                )
            )
        return TextResult(tokens=tokens)


@ray_serve.deployment(
    # More than two full batches in flight, so that one collects while another runs; the rest waits where it can be
    # refused: Serve's own default queue has no end.
    max_ongoing_requests=32,
    max_queued_requests=64,
    health_check_timeout_s=60,
)
class Encoder:
    """A replica: texts of concurrent requests share forward passes."""

    def __init__(self, run: str, max_input_tokens: int, device: str):
        self._encoder = RunEncoder(open_run(run, verify=False), max_input_tokens, device)
        self._encoder.encode(["a"], top_k=1)  # a replica that can't answer must not become healthy

    async def encode(self, texts: list[str], top_k: int, prefix: int | None) -> list[TextResult] | TextTooLongError:
        """As RunEncoder.encode, but an overlong text is a value: Serve logs what is raised as the service's fault."""
        try:
            windows = await asyncio.to_thread(self._encoder.tokenise, texts)
        except TextTooLongError as error:
            return error
        return list(await asyncio.gather(*(self._encode_window(Window(ids, top_k, prefix)) for ids in windows)))

    @ray_serve.batch(max_batch_size=MAX_BATCH_TEXTS, batch_wait_timeout_s=0.005)
    async def _encode_window(self, windows: list[Window]) -> list[TextResult]:
        # In a thread, so that the next batch collects and health checks are answered meanwhile.
        return await asyncio.to_thread(self._encoder.encode_windows, windows)


def _chunks(lengths: list[int]) -> list[list[int]]:
    """Indices of non-empty windows, in groups of at most MAX_BATCH_TOKENS tokens, or one window."""
    chunks: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if not length:
            continue
        if not chunks or tokens + length > MAX_BATCH_TOKENS or len(chunks[-1]) == MAX_BATCH_TEXTS:
            chunks.append([])
            tokens = 0
        chunks[-1].append(index)
        tokens += length
    return chunks


def _strongest(activations: Tensor, top_k: int) -> list[list[FeatureActivation]]:
    """Each token's active features [tokens, features], strongest first, equal ones by index.

    Sorts only the active entries, about one in a hundred: two stable sorts keep the order of indices among equals,
    which topk does not promise.
    """
    rows, columns = activations.nonzero(as_tuple=True)
    values = activations[rows, columns]
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    features: list[list[FeatureActivation]] = [[] for _ in range(activations.shape[0])]
    triples = zip(rows[order].tolist(), columns[order].tolist(), values[order].tolist(), strict=True)
    for row, column, value in triples:
        if len(features[row]) < top_k:
            features[row].append(FeatureActivation(feature_index=column, activation_value=value))
    return features
