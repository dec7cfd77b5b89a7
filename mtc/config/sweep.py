"""A sweep: overrides of a run's settings, one transcoder for each, all trained on one stream of activations.

Two forms are read, both into a list of entries of dotted fields. A list has an entry for each transcoder; a grid, which
is a mapping of fields to lists of values, has one for every combination.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from pydantic import BaseModel, ValidationError

from mtc.config.faults import suggestion, wanted

Entry = dict[str, Any]
"""Values by dotted field, such as `{"transcoder.k": 16}`, as they stand in JSON."""
SHARED = frozenset({"transcoder.calibration_tokens", "optimizer.batch_tokens"})
"""Fields of the swept parts that the stream of activations fixes for all transcoders."""
MOST_MEMBERS = 256
"""More transcoders of one run than any report compares well."""
LONGEST_NAME = 60


def read_sweep(value: Any, parts: Mapping[str, BaseModel]) -> tuple[Entry, ...]:
    """The entries of either form, checked; `parts` are the settings that entries override, by name.

    Raises ValueError with a line for each fault.
    """
    entries = _grid(value) if isinstance(value, dict) else _listed(value)
    if len(entries) < 2:
        raise ValueError(
            f"sweep: at least 2 transcoders are wanted, got {len(entries)}; one transcoder's settings stand in "
            f"{' and '.join(parts)}"
        )
    if len(entries) > MOST_MEMBERS:
        raise ValueError(f"sweep: at most {MOST_MEMBERS} transcoders are wanted, got {len(entries)}")
    checked = tuple(_checked(f"sweep.{number}", entry, parts) for number, entry in enumerate(entries))
    settings = [_settings(entry, parts) for entry in checked]
    for number, one in enumerate(settings):
        if (first := settings.index(one)) < number:
            raise ValueError(f"sweep.{number} and sweep.{first} are the same settings: {checked[number]}")
    return checked


def overridden(entry: Entry, parts: Mapping[str, BaseModel]) -> dict[str, BaseModel]:
    """The parts with an entry's values in them; raises pydantic's ValidationError."""
    settings = _settings(entry, parts) if entry else {}
    return {name: type(parts[name]).model_validate(values) for name, values in settings.items()}


def entry_names(entries: Iterable[Entry]) -> list[str]:
    """A short name for each entry, unique, that can stand in paths and URLs: `k16`, `k64-seed1`, `groups288x576x288`,
    `lr0.003`."""
    names: list[str] = []
    for number, entry in enumerate(entries):
        name = "-".join(_name(field.rpartition(".")[2], value) for field, value in entry.items()) or "base"
        if len(name) > LONGEST_NAME or name in names:
            name = f"{name[:LONGEST_NAME].rstrip('-._')}-{number}"
        names.append(name)
    return names


def _grid(value: dict[Any, Any]) -> list[Any]:
    flat = _flat("sweep", value)
    for field, values in flat.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"sweep.{field}: a list of values is wanted in a grid, got {values!r}")
    count = 1
    for values in flat.values():
        count *= len(values)
    if count > MOST_MEMBERS:  # before they are made
        raise ValueError(f"sweep: at most {MOST_MEMBERS} transcoders are wanted, the grid has {count}")
    return [dict(zip(flat, values, strict=True)) for values in product(*flat.values())]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            "sweep: a list of overrides, such as [{transcoder.k: 16}, {transcoder.k: 64}], or a grid, such as "
            f"{{transcoder.k: [16, 64]}}, is wanted, got {str(value)[:100]!r}"
        )
    return list(value)


def _flat(place: str, value: Any) -> Entry:
    """Dotted fields of a mapping, of which parts may be nested."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a mapping of fields is wanted, such as transcoder.k: 16, got {str(value)[:100]!r}")
    flat: Entry = {}
    for key, inner in value.items():
        fields = {f"{key}.{name}": each for name, each in inner.items()} if isinstance(inner, dict) else {key: inner}
        for field, each in fields.items():
            if field in flat:
                raise ValueError(f"{place}.{field} stands there twice")
            flat[str(field)] = each
    return flat


def _checked(place: str, value: Any, parts: Mapping[str, BaseModel]) -> Entry:
    """An entry whose values are what its fields make of them; raises ValueError."""
    entry = _flat(place, value)
    known = [f"{name}.{field}" for name, part in parts.items() for field in type(part).model_fields]
    swept = " and ".join(f"{name}.*" for name in parts)
    for field in entry:
        if field in SHARED:
            raise ValueError(f"{place}.{field}: all transcoders of a sweep share it; give {field} instead")
        if field not in known:
            end = suggestion(field, [name for name in known if name not in SHARED])
            raise ValueError(
                f"{place}.{field} can't be swept; what may be is {swept} without {' and '.join(sorted(SHARED))}{end}"
            )
    try:
        made = overridden(entry, parts)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ValueError("\n".join(_fault(place, fault, error.title, parts) for fault in faults)) from None
    split = (field.split(".", 1) for field in entry)
    return {f"{part}.{name}": made[part].model_dump(mode="json")[name] for part, name in split}


def _settings(entry: Entry, parts: Mapping[str, BaseModel]) -> dict[str, dict[str, Any]]:
    settings = {name: part.model_dump(mode="json") for name, part in parts.items()}
    for field, value in entry.items():
        part, _, name = field.partition(".")
        settings[part][name] = value
    return settings


def _fault(place: str, fault: Any, model: str, parts: Mapping[str, BaseModel]) -> str:
    if fault["type"] == "value_error":
        return f"{place}: {wanted(fault)}"
    (part,) = (name for name, each in parts.items() if type(each).__name__ == model)
    field = ".".join(str(each) for each in (part, *fault["loc"]))
    return f"{place}.{field}: {wanted(fault)}, got {repr(fault['input'])[:200]}"


def _name(field: str, value: Any) -> str:
    short = {"group_sizes": "groups"}.get(field, field.replace("_", "-"))
    if isinstance(value, bool):
        return short if value else f"no-{short}"
    if value is None:
        return f"{short}-default"
    text = "x".join(str(each) for each in value) if isinstance(value, list | tuple) else str(value)
    text = re.sub(r"[^A-Za-z0-9.x-]", "", text)
    return f"{short}{text}" if text[:1].isdigit() else f"{short}-{text}"
