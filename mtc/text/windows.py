"""How a document is cut into windows of token ids, and which split it belongs to.

A hash of its text and the seed decides on a document's split, so that its windows and all copies of it lie on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from mtc.text.tokens import encode_text, special_id_set

SPLITS = ("train", "heldout")
SCHEMA = pa.schema(
    {
        "document_id": pa.string(),
        "split": pa.string(),
        "trainable": pa.int32(),
        "length": pa.int32(),
        "input_ids": pa.list_(pa.int32()),
    }
)


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


def make_windows(text: str, tokenizer: Any, context_length: int) -> list[list[int]]:
    """Cut one document into consecutive windows that do not overlap.

    Each window starts with BOS where the tokenizer has one and holds at most `context_length` ids; the last may be
    shorter, and windows with fewer than 2 trainable tokens are dropped.
    """
    ids = encode_text(text, tokenizer).ids.tolist()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = context_length - len(start)
    special = special_id_set(tokenizer)
    windows = (ids[at : at + step] for at in range(0, len(ids), step))
    return [start + window for window in windows if sum(i not in special for i in window) >= 2]


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
