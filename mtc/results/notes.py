"""What a person says of a feature."""

from __future__ import annotations

from pydantic import Field

from mtc.record import Record

MOST_CHARACTERS = 500
"""Of a note."""


class FeatureNote(Record):
    """A person's own note on a feature, and whether it has a star."""

    note: str | None = Field(default=None, max_length=MOST_CHARACTERS)
    """What the feature is about, in the person's words; None without."""
    star: bool = False
    """Whether it is one of those to come back to."""
    changed: str = ""
    """When it was written, ISO 8601, UTC; of two for one feature the later one counts."""
