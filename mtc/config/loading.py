"""From presets, files and dictionaries to a RunConfig, and back to YAML."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml
from pydantic import ValidationError

from mtc.config.run_config import ConfigError, LayerConfig, RunConfig


def preset_names() -> list[str]:
    """Names that `--preset` accepts."""
    files = (resources.files("mtc.config") / "presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_preset(name: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The preset `name` with nested `overrides`; raises ConfigError for an unknown name or a bad value."""
    if name not in preset_names():
        raise ConfigError(f"--preset {name!r} is unknown; known presets: {', '.join(preset_names())}")
    text = (resources.files("mtc.config") / "presets" / f"{name}.yaml").read_text()
    return make_config(yaml.safe_load(text), overrides or {})


def make_config(*layers: dict[str, Any]) -> RunConfig:
    """Merge nested dicts, later ones winning, and validate; raises ConfigError with one line per bad field."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge_settings(merged, layer)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_readable(e) for e in error.errors())) from None


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, as it is saved: of `model.layer` and `model.layers` only the one that decides."""
    parts = config.model_dump(mode="json")
    for name in LayerConfig.model_fields if config.model.layers else ("layers",):
        del parts["model"][name]
    return yaml.safe_dump(parts, sort_keys=False)


def merge_settings(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested values of two mappings in one, those of `top` winning."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = merge_settings(_without_replaced_layers(below, value) if key == "model" else below, value)
        else:
            merged[key] = value
    return merged


def _without_replaced_layers(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` without what it says of layers in another way than `top` does."""
    if top.get("layers"):
        return {name: value for name, value in base.items() if name != "layer"}
    if "layer" in top:
        return {name: value for name, value in base.items() if name != "layers"}
    sites = {name: top[name] for name in ("source", "target") if name in top}
    if not sites or not isinstance(base.get("layers"), list | tuple):
        return base
    return base | {"layers": [(e if isinstance(e, dict) else {"layer": e}) | sites for e in base["layers"]]}


def _readable(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message  # our own checks name their fields
    shown = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"{field}: {message}{shown}"
