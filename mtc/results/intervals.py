"""95 % confidence intervals, as they are written down."""

from __future__ import annotations

from mtc.record import Record

MIN_DOCUMENTS = 5
"""With fewer there is no interval: the resampled values would be those of a handful of texts."""
Intervals = list[tuple[float, float]]


class Interval(Record):
    """A measured value and its 95 % interval."""

    value: float
    """What was measured."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
