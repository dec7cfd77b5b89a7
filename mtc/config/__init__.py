"""What a run is told: the RunConfig, its presets, and how one is loaded."""

from mtc.config.loading import load_preset, make_config, merge_settings, preset_names, to_yaml
from mtc.config.run_config import ConfigError, DataConfig, LayerConfig, ModelConfig, RunConfig, SiteKey

__all__ = [
    "ConfigError", "DataConfig", "LayerConfig", "ModelConfig", "RunConfig", "SiteKey", "load_preset", "make_config",
    "merge_settings", "preset_names", "to_yaml",
]  # fmt: skip
