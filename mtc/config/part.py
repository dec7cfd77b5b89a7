"""What the parts of the configuration have in common: finite numbers, text that can be a name, and shared limits."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mtc.record import Record

MOST = 10**15
"""More tokens or steps than any run has; exact in float64, and far from what int64 holds."""
MOST_FEATURES = 1 << 24
MOST_SEED = 2**63 - 1
YEAR = 365 * 86_400
"""In seconds; clocks and locks don't take any number."""


def _printable(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise PydanticCustomError("not_printable", "text without control characters is wanted")
    return text


Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_printable)]


class Part(Record):
    """A part of the configuration: its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)
