"""95 % confidence intervals, as they are written down."""

from __future__ import annotations

from mtc.record import Record

MIN_DOCUMENTS = 5
"""Fewest documents that an interval is given for: the resampled values of fewer would be those of a handful of
texts."""
Intervals = list[tuple[float, float]]


class Interval(Record):
    """A measured value and its 95 % interval."""

    value: float
    """Value that was measured."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
