"""How a document is cut into windows of token ids, and which split it belongs to.

A hash of its text and the seed decides on a document's split, so that its windows and all copies of it lie on one side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

SPLITS = ("train", "heldout")
PART_CHARS = 1_000_000
"""Most characters that the tokenizer is given at once: until its call returns it holds some 150 bytes for each of
them."""
SCHEMA = pa.schema(
    {
        "document_id": pa.string(),
        "split": pa.string(),
        "trainable": pa.int32(),
        "length": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
    }
)


# The longest text that may be a part, in order of preference: before a single space, before any whitespace.
_PARTS = (re.compile(r".*\S(?= \S)", re.DOTALL), re.compile(r".+(?=\s)", re.DOTALL))


class Window(NamedTuple):
    document_id: str
    """`document_id` of the text that the window is cut from."""
    split: str
    """Split that the window's document belongs to: "train" or "heldout"."""
    input_ids: list[int]
    """At most context_length token ids of one document, BOS first where the tokenizer has one."""


def document_id(text: str) -> str:
    """16 hex digits of the text's sha256, so that copies of a document never lie on both sides of the split."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def document_split(document_id: str, heldout_fraction: float, seed: int) -> str:
    """The split of a document: "heldout" for a `heldout_fraction` of all ids, else "train"; decided by a hash of the id
    and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{document_id}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) < heldout_fraction * 2**64 else "train"


def special_ids(tokenizer: Any) -> list[int]:
    """Sorted token ids that stand for no text: the named special tokens and those that the vocabulary marks as
    special."""
    return sorted(_special_ids(tokenizer))


def make_windows(text: str, tokenizer: Any, context_length: int) -> list[list[int]]:
    """Cut one document into consecutive windows that do not overlap.

    Each window starts with BOS where the tokenizer has one and holds at most `context_length` ids; the last may be
    shorter, and windows with fewer than 2 trainable tokens are dropped. Special tokens spelled out in the text are
    read as plain text. A text of more than PART_CHARS is tokenised in parts; windows do not end where parts do.
    """
    ids: list[int] = []
    for part in text_parts(text):
        # verbose=False: a document may be longer than the model's context, since it is cut afterwards.
        encoded = tokenizer(
            part, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids += encoded["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = context_length - len(start)
    special = _special_ids(tokenizer)
    windows = (ids[at : at + step] for at in range(0, len(ids), step))
    return [start + window for window in windows if sum(i not in special for i in window) >= 2]


def text_parts(text: str) -> Iterator[str]:
    """The text in parts of at most PART_CHARS, each as long as a cut at whitespace lets it be.

    A cut lies before a single space between two words where there is one: byte-level and SentencePiece tokenizers
    start a word's first token with that space, so it has the same tokens there as in the whole text.
    """
    start = 0
    while len(text) - start > PART_CHARS:
        cuts = (pattern.match(text, start, start + PART_CHARS) for pattern in _PARTS)
        end = next((cut.end() for cut in cuts if cut), start + PART_CHARS)
        yield text[start:end]
        start = end
    yield text[start:]


def windows_table(windows: Sequence[Window], special: Sequence[int]) -> pa.Table:
    """The windows as a table of SCHEMA; `trainable` counts the ids of each that are not in `special`."""
    excluded = set(special)
    columns = {
        "document_id": [w.document_id for w in windows],
        "split": [w.split for w in windows],
        "trainable": [sum(i not in excluded for i in w.input_ids) for w in windows],
        "length": [len(w.input_ids) for w in windows],
        "input_ids": [w.input_ids for w in windows],
    }
    return pa.table(columns, schema=SCHEMA)


@lru_cache(maxsize=2)  # asked for every document, and slow for vocabularies with thousands of added tokens
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)})
