"""What is wrong with settings: a line for each field, that names it, what is wanted there and what was given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

_WANTED = {
    "bool_parsing": "true or false is wanted", "bool_type": "true or false is wanted",
    "dict_type": "a mapping of fields is wanted", "model_type": "a mapping of fields is wanted",
    "extra_forbidden": "there is no such field", "finite_number": "a finite number is wanted",
    "float_parsing": "a number is wanted", "float_type": "a number is wanted",
    "greater_than": "more than {gt} is wanted", "greater_than_equal": "at least {ge} is wanted",
    "int_from_float": "a whole number is wanted", "int_parsing": "a whole number is wanted",
    "int_parsing_size": "a whole number of fewer digits is wanted", "int_type": "a whole number is wanted",
    "less_than": "less than {lt} is wanted", "less_than_equal": "at most {le} is wanted",
    "literal_error": "{expected} is wanted", "missing": "required, but not given",
    "string_pattern_mismatch": "text like {pattern} is wanted",
    "string_too_long": "at most {max_length} characters are wanted",
    "string_too_short": "text is wanted", "string_type": "text is wanted",
    "string_unicode": "text in Unicode is wanted",
    "too_long": "a list of at most {max_length} is wanted", "too_short": "a list of at least {min_length} is wanted",
    "list_type": "a list is wanted", "tuple_type": "a list is wanted",
}  # fmt: skip
"""Pydantic's kinds of errors in our words."""
_LONGEST = 200  # characters of a value that are repeated


def describe_faults(error: ValidationError, model: type[BaseModel]) -> str:
    """The faults that were found when `model` was made, one line each."""
    faults = error.errors(include_url=False)
    names = list(field_names(model))
    # Where an item of a list is wrong, the list also has too few.
    shown = [f for f in faults if f["type"] != "too_short" or not any(_is_within(g["loc"], f["loc"]) for g in faults)]
    return "\n".join(_line(fault, names) for fault in shown)


def wanted(fault: Any) -> str:
    """What pydantic says of one fault, one of `ValidationError.errors()`, in our words; without what was given."""
    words = _WANTED.get(fault["type"])
    # Our own checks name their fields.
    return words.format_map(fault.get("ctx", {})) if words else str(fault["msg"]).removeprefix("Value error, ")


def field_names(model: type[BaseModel]) -> Iterator[str]:
    """Dotted names of a model's fields, and of those of the models in it."""
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{inner}" for inner in field_names(field.annotation))


def suggestion(wrong: str, names: Sequence[str]) -> str:
    """What may have been meant by a dotted name that is none of `names`, as the end of a message."""
    parent, _, last = wrong.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    meant = [name for name in names if name.rpartition(".")[2] == last]
    meant = meant or [beside[name] for name in get_close_matches(last, beside, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _line(fault: Any, names: Sequence[str]) -> str:
    message = wanted(fault)
    if fault["type"] == "value_error":
        return message
    field = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("("))  # a form of the value
    if fault["type"] == "missing":
        return f"{field}: {message}"
    value = repr(fault["input"])
    value = value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
    end = suggestion(re.sub(r"\.\d+", "", field), names) if fault["type"] == "extra_forbidden" else ""
    return f"{field}: {message}, got {value}{end}"


def _is_within(inner: Sequence[object], outer: Sequence[object]) -> bool:
    return len(inner) > len(outer) and tuple(inner[: len(outer)]) == tuple(outer)
