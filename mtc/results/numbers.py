"""How figures are written: the same digits in the report, in findings and in comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NOT_MEASURED = "not measured"


def number(value: float | None) -> str:
    """Integers in full; other numbers with four significant digits; None is `not measured`."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "undefined"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def numbers(values: Iterable[float | None]) -> str:
    return ", ".join(number(v) for v in values)


def percent(fraction: float | None) -> str:
    if fraction is None or not math.isfinite(fraction):
        return number(fraction)
    return f"{number(100 * fraction)} %"


def interval(intervals: Sequence[tuple[float, float]] | None, i: int) -> str:
    """The two ends of interval `i` of several."""
    return NOT_MEASURED if intervals is None else " to ".join(map(number, intervals[i]))


def percent_interval(intervals: Sequence[tuple[float, float]] | None, i: int) -> str:
    return NOT_MEASURED if intervals is None else " to ".join(map(percent, intervals[i]))


def whole_range(low: int, high: int) -> str:
    """The whole numbers from `low` to `high`, as text."""
    return number(low) if low == high else f"{number(low)} to {number(high)}"
