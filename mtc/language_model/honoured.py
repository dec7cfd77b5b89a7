"""Which fields of a language model's configuration are obeyed here, and at which values; all else is refused by name.

transformers keeps every key of a `config.json`, also those that none of its modules reads, and the causal mask is ours
(attention.py), so what a field asks of the mask is obeyed only where it is listed. A field is one of these:

- free: transformers' own modules obey it at every value, since they are what runs, or attention.py does;
- limited: obeyed at some values, which its rule tells;
- without a part in a forward pass: names, ids, dropout, what other tools leave behind;
- unknown: it must be off (null, false, empty), or at the default of the class that declares it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from mtc.language_model.architectures import ModelError

Rule = Callable[[Any, PretrainedConfig], str | None]
"""What is obeyed of a field, in words, where its value in a configuration is not; else None."""


class Fields(NamedTuple):
    """The fields of one architecture that take part in a forward pass."""

    free: frozenset[str]
    """Fields that are obeyed at every value."""
    limited: dict[str, Rule]
    """Rule of each field that is obeyed only at some values."""


def check_fields(name: str, config: PretrainedConfig) -> None:
    """Raise ModelError if the configuration of the model called `name` asks for what would not be done."""
    text = config.get_text_config()
    wrong = [*_wrong(config), *(_wrong(text) if text is not config else ())]
    if wrong:
        raise ModelError(
            f"model.name={name} can't be run as its config.json says: {'; '.join(wrong)} (a field of no account can "
            "be removed in a local copy)"
        )


def sorted_in(model_type: str, field: str) -> bool:
    """Whether a field of an architecture's configuration is listed here."""
    fields = HONOURED[model_type]
    return field in fields.free or field in fields.limited or field in _EVERYWHERE or _has_no_part(field)


def _wrong(config: PretrainedConfig) -> Iterator[str]:
    if config.is_heterogeneous:  # reading a field of such a configuration raises
        yield "per_layer_config is not supported: all layers must be alike"
        return
    fields = HONOURED[config.model_type]
    limited = _EVERYWHERE | fields.limited
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, value in vars(config).items():
        if field in limited:
            obeyed = limited[field](value, config)
            if obeyed is not None:
                yield f"{field}={_short(value)}, and supported is only {obeyed}"
        elif not (field in fields.free or _has_no_part(field) or not value or value == defaults.get(field)):
            yield f"{field}={_short(value)}, which nothing reads in a model of type {config.model_type}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_no_part(field: str) -> bool:
    return (
        field in _NO_PART
        or field.startswith(("_", "summary_", "tokenizer_", "unsloth_"))
        or field.endswith(("_token_id", "_token_ids", "_token_index", "_version"))
        or "dropout" in field
        or "pdrop" in field
    )


# Rules --------------------------------------------------------------------------------------------------------------


def _off(value: Any, config: PretrainedConfig) -> str | None:
    return "false" if value else None


def _on(value: Any, config: PretrainedConfig) -> str | None:
    return "true" if value is not None and not value else None


def _positive(value: Any, config: PretrainedConfig) -> str | None:
    return None if value is None or value > 0 else "null or more than 0"


def _same_as(other: str) -> Rule:
    def rule(value: Any, config: PretrainedConfig) -> str | None:
        expected = getattr(config, other)
        return None if value in (None, expected) else f"what {other} says, {expected!r}"

    return rule


def _head_dim(value: Any, config: PretrainedConfig) -> str | None:
    width = config.hidden_size // config.num_attention_heads
    return None if value in (None, width) else f"{width}, the width divided by the heads"


def _feed_forward(value: Any, config: PretrainedConfig) -> str | None:
    width = config.n_inner or 4 * config.n_embd
    return None if value == width else f"{width}, as n_inner says"


def _layer_types(value: Any, config: PretrainedConfig) -> str | None:
    if not set(value or ()) <= {"full_attention", "sliding_attention"}:
        return "full_attention and sliding_attention"
    if "sliding_attention" in (value or ()) and not config.sliding_window:
        return f"sliding_attention with a sliding_window, which is {config.sliding_window}"
    return None


def _no_model_code(value: Any, config: PretrainedConfig) -> str | None:
    """Modelling code that comes with the weights is never run, and a known model type would be run in its place."""
    return "one without code for an AutoModel" if any(str(key).startswith("AutoModel") for key in value or ()) else None


def _rope(partial: bool) -> Rule:
    """Rotary position embeddings; `partial` where the plain ones of an architecture can rotate a part of a head."""

    def rule(value: Any, config: PretrainedConfig) -> str | None:
        parts = [value or {}]
        if any(isinstance(part, dict) for part in parts[0].values()):  # one for each type of layer
            parts = [part or {} for part in parts[0].values()]
        for part in parts:
            kind, factor = part.get("rope_type", "default"), part.get("partial_rotary_factor")
            if kind not in _ROPE_TYPES:
                # longrope takes other frequencies for all windows of a pass once one of them is long.
                return f"the rope_type {', '.join(_ROPE_TYPES)}"
            if factor not in (None, 1) and not partial and kind != "proportional":
                return "a partial_rotary_factor of 1"
            if unknown := sorted(key for key, entry in part.items() if entry and key not in _ROPE_KEYS):
                return f"{', '.join(sorted(_ROPE_KEYS))}, without {', '.join(unknown)}"
        return None

    return rule


_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "proportional")
"""dynamic is the plain kind up to max_position_embeddings, and no longer window is run."""
_ROPE_KEYS = frozenset((
    "rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
    "high_freq_factor", "finetuned",
))  # fmt: skip


# Fields -------------------------------------------------------------------------------------------------------------

_EVERYWHERE: dict[str, Rule] = {
    "is_causal": _on,  # transformers' masks read it, whether or not a configuration declares it
    "causal": _on,
    "is_encoder_decoder": _off,
    "add_cross_attention": _off,
    "return_dict": _on,
    "auto_map": _no_model_code,
}
_NO_PART = frozenset((
    "architectures", "cache_implementation", "chunk_size_feed_forward", "custom_pipelines", "dtype", "finetuning_task",
    "gradient_checkpointing", "id2label", "ignore_keys_at_rope_validation", "init_std", "initializer_range",
    "is_decoder", "is_llama_config", "label2id", "license", "max_sequence_length", "model_max_length", "model_name",
    "model_type", "n_ctx", "n_special", "neftune_noise_alpha", "num_labels", "output_attentions",
    "output_hidden_states", "output_past", "pad_vocab_size_multiple", "predict_special_tokens", "prefix",
    "pretraining_tp", "problem_type",
    "quantization_config",  # what it says of weights is not for here
    "seq_length", "task_specific_params", "tf_legacy_loss", "torch_dtype", "torchscript", "transformers.js_config",
    "use_bfloat16", "use_cache", "use_flash_attention_2",
))  # fmt: skip
_DECODER = frozenset((
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "original_max_position_embeddings", "tie_word_embeddings",
))  # fmt: skip
_RMS = _DECODER | {"num_key_value_heads", "head_dim", "rms_norm_eps"}
_WINDOWS: dict[str, Rule] = {"sliding_window": _positive, "layer_types": _layer_types}
_GEMMA = Fields(
    _RMS | {"attention_bias", "hidden_activation", "query_pre_attn_scalar"},
    _WINDOWS
    | {
        "rope_parameters": _rope(partial=False),
        "attn_logit_softcapping": _positive,
        "final_logit_softcapping": _positive,
        "use_bidirectional_attention": _off,
        "hidden_act": _same_as("hidden_activation"),
        "sliding_window_size": _same_as("sliding_window"),
    },
)
_QWEN2 = Fields(
    _RMS | {"hidden_act", "use_sliding_window", "max_window_layers"},
    _WINDOWS | {"rope_parameters": _rope(partial=False)},
)
HONOURED = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA._replace(free=_GEMMA.free | {"sliding_window_pattern"}),
    "gemma3": Fields(
        frozenset((
            "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
            "image_token_index", "tie_word_embeddings",
        )),
        {},
    ),
    "llama": Fields(_RMS | {"hidden_act", "attention_bias", "mlp_bias"}, {"rope_parameters": _rope(partial=False)}),
    "mistral": Fields(
        _RMS | {"hidden_act"}, {"rope_parameters": _rope(partial=False), "sliding_window": _positive}
    ),
    "qwen2": _QWEN2,
    "qwen3": _QWEN2._replace(free=_QWEN2.free | {"attention_bias"}),
    "gpt2": Fields(
        frozenset((
            "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
            "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
            "tie_word_embeddings",
        )),
        {"head_dim": _head_dim, "feed_forward_length": _feed_forward},
    ),
    "gpt_neox": Fields(
        _DECODER | {"hidden_act", "layer_norm_eps", "use_parallel_residual", "attention_bias"},
        {"rope_parameters": _rope(partial=True), "head_dim": _head_dim},
    ),
}  # fmt: skip
"""The fields of each architecture of `architectures.MODULES`."""
