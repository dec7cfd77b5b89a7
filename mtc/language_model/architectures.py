"""The table of known architectures: where the modules of a decoder layer are called what.

Another architecture is one row of `MODULES` (docs/architectures.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mtc.config import ConfigError, ModelConfig
from mtc.errors import MtcError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ModelError(MtcError):
    """The model can't be loaded; the message says what is missing."""


class ModelUnreachableError(ModelError):
    """The model's files could not be read now, because of a disk or a network; starting again may help."""

    exit_code = 1
    event = "failed"


class ModelInfo(NamedTuple):
    """What is known of a model before its weights are read."""

    model_type: str
    """Architecture of the model, as transformers names it."""
    num_layers: int
    """Layers of the whole model, loaded or not."""
    d_model: int
    """Width of the residual stream."""
    max_positions: int | None
    """Most tokens of a window that the model knows positions for; None if it does not say."""
    num_ids: int
    """Rows of the embedding: token ids from here on are none."""
    mlp_width: int
    """Width inside the MLP."""
    heads: int
    """Query heads."""
    attention_width: int
    """Query heads times the width of a head."""
    key_width: int
    """Key heads times the width of a head; values are as wide."""
    tied: bool
    """Whether the unembedding is the embedding."""

    @property
    def gated(self) -> bool:
        """Whether the MLP's nonlinearity is multiplied with another map."""
        return MODULES[self.model_type].neurons_gated is not None

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices; norms and biases, which are a thousandth of them, are left out."""
        matrices = 3 if self.gated else 2
        attention = 2 * self.d_model * (self.attention_width + self.key_width)
        return attention + matrices * self.d_model * self.mlp_width

    def weights(self, layers: int, head: bool = False) -> int:
        """Weights of the embedding and the first `layers` layers, with `head` of the unembedding too."""
        tables = 2 if head and not self.tied else 1
        return layers * self.layer_weights + tables * self.num_ids * self.d_model


class Modules(NamedTuple):
    """Module paths of one architecture: the first from the base model, the others from a layer."""

    layers: str
    norm: str = "post_attention_layernorm"
    """Path of the norm whose output the MLP reads, from the layer."""
    mlp_out: str = "mlp"
    """Path of the module whose output is added to the residual stream, from the layer."""
    attention: str = "self_attn"
    final_norm: str = "norm"
    """Path of the norm before the unembedding, from the base model."""
    neurons: str = "mlp.gate_proj"
    """Path of the linear map that the MLP's nonlinearity is applied to, from the layer."""
    neurons_gated: str | None = "mlp.up_proj"
    """Path of the linear map that the nonlinearity's result is multiplied with; None where there is none."""
    neurons_out: str = "mlp.down_proj"
    """Path of the linear map from the neurons back to the residual stream, from the layer."""
    transposed: bool = False
    """Whether these maps are stored the other way round, as a Conv1D is."""
    stored_gain: float = 0.0
    """What is added to the stored gain of an RMS norm."""


_GEMMA = Modules("layers", norm="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm", stored_gain=1.0)
MODULES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # With a vision tower, which text does not run.
    "gemma3": _GEMMA._replace(layers="language_model.layers", final_norm="language_model.norm"),
    "llama": Modules("layers"),
    "mistral": Modules("layers"),
    "qwen2": Modules("layers"),
    "qwen3": Modules("layers"),
    "gpt2": Modules(
        "h",
        norm="ln_2",
        attention="attn",
        final_norm="ln_f",
        neurons="mlp.c_fc",
        neurons_gated=None,
        neurons_out="mlp.c_proj",
        transposed=True,
    ),
    "gpt_neox": Modules(
        "layers",
        attention="attention",
        final_norm="final_layer_norm",
        neurons="mlp.dense_h_to_4h",
        neurons_gated=None,
        neurons_out="mlp.dense_4h_to_h",
    ),
}


def modules_of(config: ModelConfig, model_type: str | None) -> Modules:
    if model_type not in MODULES:
        known = ", ".join(sorted(MODULES))
        raise ConfigError(f"model.name={config.name} has the unknown architecture {model_type!r}; known: {known}")
    return MODULES[model_type]


def model_info(model_config: PretrainedConfig) -> ModelInfo:
    text = model_config.get_text_config()
    heads, d_model = text.num_attention_heads, text.hidden_size
    width = getattr(text, "head_dim", None) or d_model // heads
    return ModelInfo(
        model_type=model_config.model_type,
        num_layers=text.num_hidden_layers,
        d_model=d_model,
        max_positions=getattr(text, "max_position_embeddings", None),
        num_ids=text.vocab_size,
        mlp_width=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d_model,
        heads=heads,
        attention_width=heads * width,
        key_width=(getattr(text, "num_key_value_heads", None) or heads) * width,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def validate(config: ModelConfig, info: ModelInfo, context_length: int = 0) -> ModelInfo:
    """Raises ConfigError where the configuration asks for what the model does not have."""
    modules_of(config, info.model_type)
    field = "model.layers" if config.layers else "model.layer"
    for sites in config.of_layers(info.num_layers).sites:
        if sites.layer >= info.num_layers:
            raise ConfigError(
                f"{field}={sites.layer} is out of range: {config.name} has {info.num_layers} layers "
                f"(0..{info.num_layers - 1})"
            )
    # Learnt positions end there. Rotary ones go on, but no longer mean what the model was trained for.
    if info.max_positions is not None and context_length > info.max_positions:
        raise ConfigError(
            f"data.context_length={context_length} is too long: {config.name} knows {info.max_positions} positions "
            "(max_position_embeddings)"
        )
    return info
