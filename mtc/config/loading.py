"""From presets, files and dictionaries to a RunConfig, and back to YAML."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml
from pydantic import ValidationError

from mtc.config.faults import describe_faults, suggestion
from mtc.config.files import parse_settings
from mtc.config.reading import ALL, LayerConfig
from mtc.config.run_config import ConfigError, RunConfig


def preset_names() -> list[str]:
    """Names that `--preset` accepts."""
    files = (resources.files("mtc.config") / "presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_preset(name: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The preset `name` with nested `overrides`; raises ConfigError for an unknown name or a bad value."""
    if name not in preset_names():
        known = ", ".join(preset_names())
        raise ConfigError(f"--preset {name!r} is unknown; known presets: {known}{suggestion(name, preset_names())}")
    content = (resources.files("mtc.config") / "presets" / f"{name}.yaml").read_bytes()
    return make_config(parse_settings(content, f"--preset {name}"), overrides or {})


def make_config(*layers: dict[str, Any]) -> RunConfig:
    """Merge nested dicts, later ones winning, and validate; raises ConfigError with one line per bad field."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge_settings(merged, layer)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, RunConfig)) from None


def changed_config(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """A trained run's configuration with other values in `analysis` and `cluster`; raises ConfigError for other
    parts."""
    if other := [f"{part}.{f}" for part in overrides if part not in ("analysis", "cluster") for f in overrides[part]]:
        raise ConfigError(
            f"{', '.join(other)}: the run is trained already; only analysis.* and cluster.* can be changed"
        )
    return make_config(config.model_dump(), overrides)


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, as it is saved: of `model.layer` and `model.layers` only the one that decides."""
    parts = config.model_dump(mode="json")
    listed = ("layer",) if config.model.layers == ALL else tuple(LayerConfig.model_fields)
    for name in listed if config.model.layers else ("layers",):
        del parts["model"][name]
    if config.sweep is None:
        del parts["sweep"]
    return yaml.safe_dump(parts, sort_keys=False)


def merge_settings(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Nested values of two mappings in one, those of `top` winning."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and key != "sweep":  # two grids are not one
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
