"""Text to token ids, as in training, with where each token stands in the text."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtc.config import ModelConfig
from serve.results import Tokenised


class Tokeniser:
    """Text never becomes a special token; BOS comes first where the tokenizer has one."""

    def __init__(self, config: ModelConfig):
        from mtc.model_files import load_tokenizer
        from mtc.tokens import special_ids

        self._tokenizer: Any = load_tokenizer(config)
        self._bos = self._tokenizer.bos_token_id
        self._special = sorted(special_ids(self._tokenizer))
        self.vocab_size = len(self._tokenizer)
        """Ids from here on are none."""
        self._strings: dict[int, str] = {}

    def text(self, text: str, limit: int | None = None) -> Tokenised:
        """At most `limit` tokens of a text, BOS included; by default all."""
        found = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(found["input_ids"], np.int32)
        offsets = np.array(found["offset_mapping"], np.int32).reshape(-1, 2)
        if self._bos is not None:
            ids, offsets = np.r_[np.int32(self._bos), ids], np.r_[np.zeros((1, 2), np.int32), offsets]
        truncated = limit is not None and len(ids) > limit
        if truncated:
            ids, offsets = ids[:limit], offsets[:limit]
        return Tokenised(ids, offsets, np.isin(ids, self._special), truncated)

    def ids(self, token_ids: list[int], limit: int | None = None) -> Tokenised:
        """A window of ids as it is."""
        ids = np.array(token_ids[:limit], np.int32)
        return Tokenised(ids, None, np.isin(ids, self._special), len(token_ids) > len(ids))

    def token(self, token_id: int) -> str:
        """An id decoded on its own."""
        string = self._strings.get(token_id)
        if string is None:
            string = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
            self._strings[token_id] = string
        return string
