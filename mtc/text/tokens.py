"""From text to token ids and from token ids to text: the one way for training, analysis, probing and serving."""

from __future__ import annotations

import codecs
import re
import string
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

PART_CHARS = 1_000_000
"""Most characters that the tokenizer is given at once: until its call returns it holds some 150 bytes for each of
them."""
OVERLAP = 16_384
"""Characters that two parts of a long text share."""
AGREED = 32
"""Fewest tokens in a row that two parts must read alike to be joined among them."""
TRIES = 16
"""Characters, one behind the other, at which a part may begin."""


class TextTokens(NamedTuple):
    """A text as a tokenizer reads it."""

    ids: NDArray[np.int32]
    """[tokens], without BOS or other special tokens."""
    offsets: NDArray[np.int32]
    """[tokens, 2], first character of each token in the text and the one behind its last; tokens that share a character
    share its range."""


def encode_text(text: str, tokenizer: Any) -> TextTokens:
    """All tokens of a text, whatever truncation or padding the tokenizer's file or its last caller has set, which is
    undone. Special tokens spelled out in the text are read as plain text.

    A text of more than PART_CHARS is read in parts that overlap, joined in the middle of where both read the same
    tokens: what the tokenizer does at the beginning and the end of a text is done there alone, as if it read the whole
    at once. Only where they share no AGREED tokens (the text has a piece of thousands of characters that is one token
    or none, such as an unknown word) do two parts meet without, and a token there may be cut or a space be added.
    """
    backend = _plain_backend(tokenizer)
    joined: list[TextTokens] = []
    start, part = 0, _encode(backend, text, 0, PART_CHARS)
    while (end := start + PART_CHARS) < len(text):
        settled = end - OVERLAP // 4  # less what the part's own end may change
        start = _next_start(backend, text, part, settled, end)
        following = _encode(backend, text, start, start + PART_CHARS)
        agreed, left, right = _agreement(part, following, start, settled)
        if agreed < AGREED:
            left, right = int(np.searchsorted(part.offsets[:, 0], start)), 0
        joined.append(_slice(part, 0, left))
        part = _slice(following, right, len(following.ids))
    return TextTokens(*(np.concatenate(columns) for columns in zip(*joined, part, strict=True)))


def special_ids(tokenizer: Any) -> list[int]:
    """Sorted token ids that stand for no text: the named special tokens and those that the vocabulary marks as
    special."""
    return sorted(special_id_set(tokenizer))


@lru_cache(maxsize=2)  # asked for every document, and slow for vocabularies with thousands of added tokens
def special_id_set(tokenizer: Any) -> frozenset[int]:
    """`special_ids` as a set."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)})


class TokenTexts:
    """The texts of a tokenizer's tokens, as they stand behind other text: ` the` for `▁the` or `Ġthe`, `ing` for
    `##ing`. Special tokens are shown by their name, ids that are no token as `<id>`. Threads may share one.
    """

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        special, model = special_id_set(tokenizer), self._backend.model
        self._names = {
            i: token.content
            for i, token in self._backend.get_added_tokens_decoder().items()
            # Only what the model may give itself is spelled in its way: a decoder would misread the others.
            if i in special or model.token_to_id(token.content) != i
        }
        self._texts: dict[int, str] = {}
        self._parts: dict[int, bytes] = {}
        """Bytes of the tokens that begin or end within a character."""
        self._anchor, self._before, self._after = self._find_anchor()

    def token(self, token_id: int) -> str:
        """The text of a token alone; what is no whole character as its bytes, such as `<0xE2>`."""
        if token_id not in self._texts:
            self._learn(token_id)
        return self._texts[token_id]

    def is_part(self, token_id: int) -> bool:
        """Whether a token begins or ends within a character, so that its text depends on the tokens beside it."""
        self.token(token_id)
        return token_id in self._parts

    def sequence(self, token_ids: Sequence[int], starts_text: bool = False) -> list[str]:
        """What each token adds to the text of a sequence; joined, they are that text.

        A character of several tokens is shown at its last, and those before it may be empty; what is left of one is
        U+FFFD. `starts_text` says that the first begins a text: a space that the tokenizer puts there itself is left
        out.
        """
        known = self._texts
        texts = [known[i] if i in known else self.token(i) for i in token_ids]
        if starts_text and texts and token_ids[0] not in self._names:
            texts[0] = self._decode([token_ids[0], *self._anchor]).removesuffix(self._after)
        if self._parts.keys().isdisjoint(token_ids):
            return texts
        for is_part, run in groupby(range(len(texts)), lambda n: token_ids[n] in self._parts):
            if is_part:
                places = list(run)
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                for n in places:
                    texts[n] = decoder.decode(self._parts[token_ids[n]], final=n == places[-1])
        return texts

    def _learn(self, token_id: int) -> None:
        name = self._backend.id_to_token(token_id)
        if token_id in self._names or name is None:
            self._texts[token_id] = self._names.get(token_id, f"<{token_id}>")
            return
        anchor = self._anchor
        text = self._decode([*anchor, token_id, *anchor])
        if text.startswith(self._before) and text.endswith(self._after):
            text = text[len(self._before) : len(text) - len(self._after)]
        else:
            text = self._decode([token_id])
        if "\ufffd" in text and (data := _bytes_of(name)) is not None:
            text = data.decode(errors="mtc_bytes")
            try:
                data.decode()
            except UnicodeDecodeError:
                self._parts[token_id] = data  # before the text, which says that the token is known
        self._texts[token_id] = text

    def _find_anchor(self) -> tuple[tuple[int, ...], str, str]:
        """A token to decode others between, since decoders treat the first and the last of a sequence in their own way;
        what it adds in front of them and behind them."""
        letters = (self._backend.token_to_id(letter) for letter in string.ascii_letters)
        for i in (*letters, *range(self._backend.get_vocab_size())):
            if i is None or i in self._names or _BYTE.fullmatch(self._backend.id_to_token(i) or "<0x00>"):
                continue
            before, two, three = (self._decode([i] * n) for n in (1, 2, 3))
            after = two.removeprefix(before)
            if before.strip() and "\ufffd" not in before and two == before + after and three == two + after:
                return (i,), before, after
        return (), "", ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=False))


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a byte that is a token."""


def _visible_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("mtc_bytes", _visible_bytes)


def _bytes_of(name: str) -> bytes | None:
    """The bytes that a token's name spells, in the way of SentencePiece or of byte-level BPE; else None."""
    if byte := _BYTE.fullmatch(name):
        return bytes.fromhex(byte[1])
    table = _byte_characters()
    return bytes(table[c] for c in name) if all(c in table for c in name) else None


@lru_cache(maxsize=1)
def _byte_characters() -> dict[str, int]:
    """The bytes that the characters of byte-level BPE stand for: those that can be printed for themselves, the others,
    in their order, behind U+00FF."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return {c: ord(c) for c in alphabet if ord(c) < 256} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _plain_backend(tokenizer: Any) -> Any:
    """The tokenizer's backend, set to read the whole of a text as text. Nothing is set that is set already, so that
    threads may share it."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return backend


def _encode(backend: Any, text: str, start: int, end: int) -> TextTokens:
    found = backend.encode(text[start:end], add_special_tokens=False)
    return TextTokens(np.array(found.ids, np.int32), np.array(found.offsets, np.int32).reshape(-1, 2) + start)


def _slice(tokens: TextTokens, first: int, end: int) -> TextTokens:
    return TextTokens(tokens.ids[first:end], tokens.offsets[first:end])


def _next_start(backend: Any, text: str, part: TextTokens, settled: int, end: int) -> int:
    """Where a part may begin that overlaps one which ends at `end`: where a token does, or less than TRIES characters
    behind, which is what it takes to be in step within a run of one character where a space is put in front of it."""
    first = int(np.searchsorted(part.offsets[:, 0], end - OVERLAP))
    start = int(part.offsets[first, 0]) if first < len(part.ids) else end
    if start > end - OVERLAP // 2:
        return end - OVERLAP
    tries = ((_encode(backend, text, n, end), n) for n in range(start, start + TRIES))
    return next((n for tried, n in tries if _agreement(part, tried, n, settled)[0] >= AGREED), start)


def _agreement(part: TextTokens, following: TextTokens, start: int, end: int) -> tuple[int, int, int]:
    """How many tokens in a row two parts that overlap from `start` to `end` read alike there up to its end, and the
    number of the one in their middle in each of both."""
    first = int(np.searchsorted(part.offsets[:, 0], start))
    ends = [int(np.searchsorted(each.offsets[:, 1], end, "right")) for each in (part, following)]
    shared = max(0, min(ends[0] - first, ends[1]))
    a, b = (_slice(each, last - shared, last) for each, last in zip((part, following), ends, strict=True))
    differ = np.flatnonzero((a.ids != b.ids) | (a.offsets != b.offsets).any(1))
    agreed = shared - (int(differ[-1]) + 1 if len(differ) else 0)
    return agreed, ends[0] - agreed // 2, ends[1] - agreed // 2
