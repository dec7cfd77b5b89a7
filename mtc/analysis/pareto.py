"""Which of several transcoders are worth having, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SAME_L0 = 0.03
"""Share by which two L0 may differ and count as the same: the threshold is calibrated on a sample of the tokens."""
RULE = (
    "A transcoder is on the front if no other one of its layer has less FVU at an L0 that is at most "
    f"{100 * SAME_L0:g} % larger, both without massive tokens. Of the front the one at the knee is taken: the one that "
    "lies farthest below the straight line from the front's sparsest to its densest transcoder, FVU against the "
    "logarithm of L0, where further active features begin to buy less. If none lies below that line, or there are "
    "fewer than three, the one with the least FVU is taken."
)


class Point(NamedTuple):
    """What one transcoder costs and what it leaves."""

    l0: float
    """Active features per token, mean."""
    fvu: float
    """Fraction of variance unexplained."""


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the Pareto front of FVU against L0, sparsest first; none twice, at least one.

    A point whose FVU is not finite is not on it, unless all are like that.
    """
    usable = [i for i, point in enumerate(points) if math.isfinite(point.fvu)] or list(range(len(points)))
    kept = [
        i for i in usable
        if not any(
            points[j].fvu < points[i].fvu and points[j].l0 <= (1 + SAME_L0) * points[i].l0 for j in usable
        )
    ]  # fmt: skip
    return sorted(kept, key=lambda i: points[i])


def knee(points: Sequence[Point]) -> int:
    """Index of the point that RULE takes."""
    best = front(points)
    least = min(best, key=lambda i: points[i].fvu)
    if len(best) < 3 or points[best[0]].l0 <= 0:
        return least
    x = [math.log(points[i].l0) for i in best]
    y = [points[i].fvu for i in best]
    if x[-1] <= x[0]:
        return least
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    below = [y[0] + slope * (at - x[0]) - value for at, value in zip(x, y, strict=True)]
    deepest = max(range(len(best)), key=below.__getitem__)
    return best[deepest] if below[deepest] > 1e-9 else least
