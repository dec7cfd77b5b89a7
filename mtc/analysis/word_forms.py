"""What a vocabulary's tokens are as words: spellings of the same word, and kinds of tokens, for any tokenizer.

Tokens are looked at by their texts alone (mtc.text.TokenTexts), which have the space that a tokenizer spells as `▁` or
`Ġ`; whether a piece stands inside a word depends on the token before it and is said by the reader of the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mtc.text import TokenTexts

Array = NDArray[Any]
NUMBER, LINE_BREAK, SPACE, PUNCTUATION, CAPITALISED, PIECE = range(1, 7)
KINDS = {
    NUMBER: "numbers",
    LINE_BREAK: "line breaks",
    SPACE: "white space",
    PUNCTUATION: "punctuation",
    CAPITALISED: "capitalised words",
    PIECE: "parts of words",
}
"""Names of the kinds of tokens; 0 is none of them."""


class WordForms(NamedTuple):
    """The tokens of a vocabulary; ids index the arrays."""

    word: Array
    """[vocabulary] int64, number of the token's word: its text without case and without space around it, but for white
    space itself. Words are numbered by their smallest token id."""
    kind: Array
    """[vocabulary] int8, kind of the token by its text alone: never PIECE."""
    begins_bare: Array
    """[vocabulary] bool: begins with a letter that has case, so that it stands in a word if such a letter is before
    it."""
    ends_in_letter: Array
    """[vocabulary] bool: ends in a letter that has case."""
    is_word: Array
    """[vocabulary] bool: holds a letter or a digit, and is no part of a character."""
    share: Array
    """[words] float64, share of each word among the counted tokens; a word that was never counted is taken to have
    been counted once."""
    spelling: Array
    """[words] int64, id of the most frequent token of each word; the smallest of equals."""


def word_forms(texts: TokenTexts, counts: Array) -> WordForms:
    """The word forms of a vocabulary; `counts` [vocabulary] says how often each id occurs in some text."""
    size = len(counts)
    numbers: dict[str, int] = {}
    word = np.zeros(size, np.int64)
    kind = np.zeros(size, np.int8)
    begins, ends, is_word = (np.zeros(size, bool) for _ in range(3))
    for i in range(size):
        text, part = texts.token(i), texts.is_part(i)
        core = text.strip()
        word[i] = numbers.setdefault(core.casefold() or text, len(numbers))
        if not text or part:
            continue
        kind[i] = _kind(text, core)
        begins[i], ends[i] = _has_case(text[0]), _has_case(text[-1])
        is_word[i] = any(map(str.isalnum, core))
    order = np.lexsort((np.arange(size), -counts, word))
    firsts = order[np.r_[True, np.diff(word[order]) > 0]] if size else order
    of_word = np.bincount(word, weights=counts, minlength=len(numbers))
    return WordForms(word, kind, begins, ends, is_word, of_word.clip(min=1) / max(1.0, of_word.sum()), firsts)


def _kind(text: str, core: str) -> int:
    """The kind of a token with this text, `core` without the space around it."""
    if not core:
        return LINE_BREAK if "\n" in text else SPACE
    if not any(map(str.isalnum, core)):
        return PUNCTUATION
    if all(c.isnumeric() or c in ".,'" for c in core):
        return NUMBER
    return CAPITALISED if core[0].isupper() else 0


def _has_case(character: str) -> bool:
    return character.isupper() or character.islower()
