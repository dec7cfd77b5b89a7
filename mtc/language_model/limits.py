"""What a language model can read, known before its weights are."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoConfig

from mtc.config import ModelConfig
from mtc.language_model.weights import loading, prepare_model, revision


class InputLimits(NamedTuple):
    """Beyond them there is no row in the model's tables, or nothing that it was trained for."""

    max_positions: int | None
    """Most tokens of a window; None for a model that does not say."""
    num_ids: int
    """Rows of the embedding: token ids from here on are none."""


def input_limits(config: ModelConfig) -> InputLimits:
    """Raises ModelError and ConfigError like `check_model`."""
    with loading(config):
        text = AutoConfig.from_pretrained(prepare_model(config), **revision(config)).get_text_config()
    return InputLimits(getattr(text, "max_position_embeddings", None), text.vocab_size)
