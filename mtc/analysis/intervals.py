"""95 % confidence intervals: bootstraps over whole documents or other groups (Efron and Tibshirani 1993), whose tokens
are not independent, and Wilson's score interval (1927) of a share.

Percentile intervals: 95 % of the resampled values lie between the two ends. `scipy.stats.bootstrap` hands a statistic
the rows that were drawn; here it gets how often each group was drawn, so that sums over a million tokens are one matrix
product of their documents' sums, and the difference of two figures is taken on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtc.results import MIN_DOCUMENTS, Interval, Intervals

RESAMPLES = 1000
LEVEL = 0.95
MAX_BLOCKS = 1024
"""Most blocks that are resampled: more documents than that are put together in blocks of whole documents, which bounds
the memory."""
Array = NDArray[Any]


def intervals(statistic: Callable[[Array], Array], blocks: int, seed: int = 0) -> Intervals | None:
    """The interval of each number that `statistic` gives, or None with fewer than MIN_DOCUMENTS blocks.

    `statistic` maps weights [resamples, blocks] float64, how often each block was drawn, to values [resamples, n].
    Resamples whose value is not a number (a drawn set without variance) are left out.
    """
    if blocks < MIN_DOCUMENTS:
        return None
    low, high = _ends(statistic(_draws(blocks, RESAMPLES, seed).astype(np.float64)))
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def interval(value: float, resampled: Array) -> Interval:
    """`value` with the interval of its bootstrap resamples [resamples], those that are NaN left out."""
    low, high = _ends(resampled)
    return Interval(value=value, low=float(low), high=float(high))


def resample(groups: Array, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """How often each row is drawn, [resamples, rows] int64, when whole groups are drawn with replacement."""
    _, index = np.unique(groups, return_inverse=True)
    return _draws(int(index.max()) + 1, resamples, seed)[:, index]


def share(hits: int, total: int) -> Interval:
    """hits / total with Wilson's score interval. Raises ValueError without any."""
    from scipy.stats import binomtest  # here: 1.5 s to import, which who only reads figures should not pay

    found = binomtest(hits, total).proportion_ci(LEVEL, method="wilson")
    return Interval(value=hits / total, low=float(found.low), high=float(found.high))


def _draws(count: int, resamples: int, seed: int) -> Array:
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def _ends(values: Array) -> Array:
    """The lower and upper ends of values [resamples, ...], [2, ...]."""
    tail = (1 - LEVEL) / 2
    return np.asarray(np.nanquantile(values, [tail, 1 - tail], axis=0))
