"""Which metadata of a GGUF file is obeyed; all else that changes the arithmetic is refused by name.

transformers takes from a file what its table for the architecture maps to a field of a configuration, and drops other
metadata and tensors without a word: scaled rotary embeddings (Llama 3.1 and later, Gemma 3 from 4B on, Qwen with YaRN),
windows, experts, scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from mtc.language_model.architectures import MODULES, ModelError

_NO_PART = frozenset((
    "attention.key_length", "attention.value_length",  # weights of other shapes do not load
    "feed_forward_length", "pooling_type", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "tensor_data_layout",
))  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    # what transformers' configurations of Gemma say without the file
    "gemma2.attn_logit_softcapping": (50,),
    "gemma2.final_logit_softcapping": (30,),
    "gemma3.attention.sliding_window_pattern": (6,),
    "gemma3.rope.freq_base_swa": (10_000,),
}
"""The values at which metadata that transformers drops says what is done without it."""
_OTHER_SCALE = {"gemma2": 46, "gemma3": 62}
"""Layers of the models of 27B, which scale their scores otherwise than the smaller ones; no GGUF file says so."""


def check_gguf_fields(path: Path, values: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise ModelError if a file's metadata, or the names of its tensors, ask for what would not be done."""
    architecture = str(values.get("general.architecture"))
    if architecture not in MODULES or architecture not in GGUF_CONFIG_MAPPING:
        return  # refused as such
    read: Any = GGUF_CONFIG_MAPPING[architecture]
    wrong: list[str] = []
    for key, value in values.items():
        field = key.removeprefix(f"{architecture}.")
        if field == key or field in read or field in _NO_PART:
            continue
        neutral = _NEUTRAL.get(key, _NEUTRAL.get(field))
        if (value not in neutral) if neutral is not None else value:
            wrong.append(f"{key}={value!r:.60}")
    layers = values.get(f"{architecture}.block_count")
    if layers == _OTHER_SCALE.get(architecture, 0):
        wrong.append(f"the scale of the scores in a {architecture} of {layers} layers")
    wrong += [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    if wrong:
        raise ModelError(
            f"{path} can't be run as it says: transformers does not read {', '.join(wrong)} from a GGUF file; use the "
            "model's safetensors"
        )
