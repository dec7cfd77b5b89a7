"""Text to token ids, as in training, with where each token stands in the text."""

from __future__ import annotations

import numpy as np

from mtc.config import ModelConfig
from mtc.text import TokenTexts, encode_text, special_ids
from serve.contract import Tokenised


class Tokeniser:
    """Text never becomes a special token; BOS comes first where the tokenizer has one."""

    def __init__(self, config: ModelConfig):
        # PyTorch comes along, 2 s and 220 MB, which those that only deploy the service do without.
        from mtc.language_model import load_tokenizer

        self._tokenizer = load_tokenizer(config)
        self._texts = TokenTexts(self._tokenizer)
        bos = self._tokenizer.bos_token_id
        self._bos = np.array([] if bos is None else [bos], np.int32)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # not its length: ids may leave gaps
        """Ids from here on are none."""
        self._special = np.zeros(self.vocab_size, bool)
        self._special[special_ids(self._tokenizer)] = True

    def text(self, text: str, limit: int | None = None) -> Tokenised:
        """At most `limit` tokens of a text, BOS included; by default all."""
        found = encode_text(text, self._tokenizer)
        ids = np.concatenate([self._bos, found.ids])
        offsets = np.concatenate([np.zeros((len(self._bos), 2), np.int32), found.offsets])
        truncated = limit is not None and len(ids) > limit
        if truncated:
            ids, offsets = ids[:limit], offsets[:limit]
        return Tokenised(ids, offsets, self._special[ids], truncated)

    def ids(self, token_ids: list[int], limit: int | None = None) -> Tokenised:
        """A window of ids as it is."""
        ids = np.array(token_ids[:limit], np.int32)
        return Tokenised(ids, None, self._special[ids], len(token_ids) > len(ids))

    @property
    def bos(self) -> list[int]:
        """What comes first in every window; nothing where the tokenizer has no BOS."""
        found: list[int] = self._bos.tolist()
        return found

    def strings(self, tokenised: Tokenised) -> list[str]:
        """The tokens' texts as TokenTexts.sequence gives them; ids may stand anywhere in a text, which is why a space
        in front of them is shown."""
        ids = tokenised.ids.tolist()
        if tokenised.offsets is None:
            return self._texts.sequence(ids)
        bos = len(self._bos)
        return [*map(self._texts.token, ids[:bos]), *self._texts.sequence(ids[bos:], starts_text=True)]
