"""The one base of everything that is written down and read back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of records that are written and read back: frozen, without unknown fields; a field's docstring is its
    description.

    JSON has no NaN and no infinity: there they are strings, which any parser reads and which come back as floats.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )
