"""A griffe extension: `[a][b]` in a docstring is an array's shape, not a link."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class PlainDocstrings(Extension):
    """Put a backslash before what Markdown would take for a reference."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")
