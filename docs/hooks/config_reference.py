"""The configuration as tables, from the pydantic models: one for each part, one for the service's settings."""

from __future__ import annotations

import types
import typing
from importlib import resources
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mtc.config import LayerConfig, RunConfig, preset_names
from serve.contract import Settings

_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than",
           "min_length": "at least this many:", "max_length": "at most this many:"}  # fmt: skip


def parts() -> str:
    """Every part of RunConfig."""
    text = []
    for part, field in RunConfig.model_fields.items():
        model = field.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            text += [f"## {part}", "", " ".join((field.description or "").split()), ""]
            continue
        text += [f"## {part}", "", _summary(model), "", _table(model, f"{part}."), ""]
        if part == "model":
            text += ["### An entry of model.layers", "", _summary(LayerConfig), "", _table(LayerConfig, ""), ""]
    return "\n".join(text)


def presets() -> str:
    """The presets' files, as they are."""
    text = []
    for name in preset_names():
        content = (resources.files("mtc.config") / "presets" / f"{name}.yaml").read_text()
        text += [f"### {name}", "", "```yaml", content.rstrip(), "```", ""]
    return "\n".join(text)


def settings() -> str:
    """What `python -m serve.app --set` takes."""
    return _table(Settings, "")


def _table(model: type[BaseModel], prefix: str) -> str:
    lines = ["| Field | Type | Default | Limits | |", "| --- | --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        where = f'<span id="{prefix}{name}">`{prefix}{name}`</span>'
        description = " ".join((field.description or "").split())
        cells = [where, _type(field.annotation), _default(field), _limits(field), description]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}"
    names = {type(None): "none", str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if isinstance(value, float) and value == int(value) and value >= 1:
        value = int(value)
    return f"`{value:,}`" if isinstance(value, int) and value >= 10_000 else f"`{value}`"


def _limits(field: FieldInfo) -> str:
    found = []
    for limit in field.metadata:
        for name, word in _LIMITS.items():
            value = getattr(limit, name, None)
            if value is not None:
                found.append(f"{word} {value:,}" if isinstance(value, int) else f"{word} {value}")
        if pattern := getattr(limit, "pattern", None):
            found.append(f"`{pattern}`")
    return ", ".join(found)
