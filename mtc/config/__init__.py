"""What a run is told: the RunConfig, its presets, and how one is loaded."""

from mtc.config.faults import describe_faults, field_names, suggestion, wanted
from mtc.config.files import parse_settings, read_settings
from mtc.config.loading import changed_config, load_preset, make_config, merge_settings, preset_names, to_yaml
from mtc.config.reading import DataConfig, LayerConfig, ModelConfig, SiteKey
from mtc.config.run_config import ConfigError, Member, RunConfig

__all__ = [
    "ConfigError", "DataConfig", "LayerConfig", "Member", "ModelConfig", "RunConfig", "SiteKey", "changed_config",
    "describe_faults", "field_names", "load_preset", "make_config", "merge_settings", "parse_settings",
    "preset_names", "read_settings", "suggestion", "to_yaml", "wanted",
]  # fmt: skip
