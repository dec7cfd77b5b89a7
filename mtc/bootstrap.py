"""Confidence intervals by resampling documents (Efron and Tibshirani 1993): tokens of one document are not independent.

Percentile intervals: 95 % of the resampled values lie between the two ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
MIN_DOCUMENTS = 5
"""With fewer there is no interval: the resampled values would be those of a handful of texts."""
MAX_BLOCKS = 1024
"""More documents than that are resampled in as many blocks of whole documents, which bounds the memory."""

Intervals = list[tuple[float, float]]


def intervals(statistic: Callable[[NDArray[Any]], NDArray[Any]], blocks: int, seed: int = 0) -> Intervals | None:
    """The interval of each number that `statistic` gives, or None with fewer than MIN_DOCUMENTS blocks.

    `statistic` maps weights [resamples, blocks], how often each block was drawn, to values [resamples, n]. Resamples
    whose value is not a number (a drawn set without variance) are left out.
    """
    if blocks < MIN_DOCUMENTS:
        return None
    draws = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    values = statistic(draws.astype(np.float64))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
