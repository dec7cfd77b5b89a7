"""The windows of a small text in memory, for a notebook: one process, no store."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mtc.config import RunConfig
from mtc.text.budget import tokens_wanted
from mtc.text.documents import read_piece, source_pieces
from mtc.text.sources import DataError
from mtc.text.tokens import special_id_set
from mtc.text.windows import SPLITS, Window, document_id, document_split, make_windows

logger = logging.getLogger(__name__)


def read_windows(config: RunConfig, tokenizer: Any) -> dict[str, list[Window]]:
    """As many windows of each split, "train" and "heldout", as hold the tokens that a run of this configuration wants,
    in an order that `data.seed` shuffles.

    Raises DataError if the text is too short to train on, or if none of it is held out.
    """
    data, wanted, special = config.data, tokens_wanted(config), special_id_set(tokenizer)
    found: dict[str, list[Window]] = {split: [] for split in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    for piece in source_pieces(data):
        for document in read_piece(piece, data):
            if document.text is None:
                logger.warning("%s is left out: %s", document.name, document.reason)
                continue
            name = document_id(document.text)
            split = document_split(name, data.heldout_fraction, data.seed)
            for ids in make_windows(document.text, tokenizer, data.context_length):
                if tokens[split] < wanted[split]:
                    found[split].append(Window(name, split, ids))
                    tokens[split] += sum(i not in special for i in ids)
        if all(tokens[split] >= wanted[split] for split in SPLITS):
            break
    if tokens["train"] < (least := data.num_tokens + config.fresh_tokens):
        raise DataError(
            f"data.num_tokens={data.num_tokens} and transcoder.calibration_tokens need {least} tokens of training "
            f"text, but data.name={data.name} has {tokens['train']}: lower data.num_tokens, or give a longer text"
        )
    if not found["heldout"]:
        raise DataError(
            f"data.name={data.name} has no held-out windows: raise data.heldout_fraction={data.heldout_fraction}, or "
            "give more documents"
        )
    for windows in found.values():
        order = np.random.default_rng(data.seed).permutation(len(windows))
        windows[:] = [windows[i] for i in order]
    return found
