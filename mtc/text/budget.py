"""How much of a text a run needs: the tokens of each split, and the rows that hold them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mtc.config import RunConfig


def tokens_wanted(config: RunConfig) -> dict[str, int]:
    """Trainable tokens of each split that a store must hold for this run, unless the text is shorter."""
    training = -(-config.data.num_tokens // config.data.max_epochs)
    slack = 2 * config.data.context_length  # windows are taken whole
    return {
        "train": training + config.fresh_tokens + slack,
        "heldout": max(config.analysis.num_tokens, config.analysis.loss_tokens),
    }


def rows_wanted(
    heldout: NDArray[np.bool_], trainable: NDArray[np.int64], wanted: Mapping[str, int]
) -> tuple[int, bool]:
    """How many rows of the token store are needed until each split has its wanted tokens, and whether they are enough.

    `heldout` and `trainable` are [rows]; a row is taken whole.
    """
    needed = 0
    for split, chosen in (("train", ~heldout), ("heldout", heldout)):
        if wanted[split] <= 0:
            continue
        reached = int(np.searchsorted(np.cumsum(trainable * chosen), wanted[split]))
        if reached == len(trainable):
            return len(trainable), False
        needed = max(needed, reached + 1)
    return needed, True
