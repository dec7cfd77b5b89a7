"""95 % confidence intervals, as they are written down."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MIN_DOCUMENTS = 5
"""With fewer there is no interval: the resampled values would be those of a handful of texts."""
Intervals = list[tuple[float, float]]


class Interval(BaseModel):
    """A measured value and its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    value: float
    """What was measured."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
