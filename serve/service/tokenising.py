"""Text to token ids, as in training, with where each token stands in the text."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtc.config import ModelConfig
from serve.contract import Tokenised


class Tokeniser:
    """Text never becomes a special token; BOS comes first where the tokenizer has one."""

    def __init__(self, config: ModelConfig):
        # PyTorch comes along, 2 s and 220 MB, which those that only deploy the service do without.
        from mtc.language_model import load_tokenizer
        from mtc.text import special_ids

        self._tokenizer: Any = load_tokenizer(config)
        self._backend: Any = self._tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # as text
        self._bos = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
        self.vocab_size = len(self._tokenizer)
        """Ids from here on are none."""
        self._special = np.zeros(self.vocab_size, bool)
        self._special[sorted(special_ids(self._tokenizer))] = True
        self._strings: dict[int, str] = {}

    def text(self, text: str, limit: int | None = None) -> Tokenised:
        """At most `limit` tokens of a text, BOS included; by default all."""
        found = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(self._bos + found.ids, np.int32)
        offsets = np.array([(0, 0)] * len(self._bos) + found.offsets, np.int32).reshape(-1, 2)
        truncated = limit is not None and len(ids) > limit
        if truncated:
            ids, offsets = ids[:limit], offsets[:limit]
        return Tokenised(ids, offsets, self._special[ids], truncated)

    def ids(self, token_ids: list[int], limit: int | None = None) -> Tokenised:
        """A window of ids as it is."""
        ids = np.array(token_ids[:limit], np.int32)
        return Tokenised(ids, None, self._special[ids], len(token_ids) > len(ids))

    def token(self, token_id: int) -> str:
        """An id decoded on its own."""
        string = self._strings.get(token_id)
        if string is None:
            string = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
            self._strings[token_id] = string
        return string
