"""Models as strangers configure them: what runs here is what transformers computes, or it is refused by name."""

import dataclasses
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtc.config import ConfigError, ModelConfig
from mtc.language_model import MODULES, LanguageModel, ModelError, PackedWindows, check_model, pack_windows
from mtc.language_model.honoured import HONOURED, check_fields, sorted_in

LAYER = 1
LENGTHS = (20, 5, 40, 1, 17)
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FULL, SLIDING = "full_attention", "sliding_attention"


def make(model_type: str, directory: Path, settings: dict[str, Any], patch: dict[str, Any] | None = None) -> Path:
    """A tiny random model as transformers saves it, whose config.json is then changed by `patch`."""
    if model_type == "gemma3":  # with a vision tower
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = SHAPE | GROUPED | settings
        config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, image_token_index=63)
    else:
        shape = {"gpt2": SHAPE, "gpt_neox": SHAPE | {"intermediate_size": 64}}.get(model_type, SHAPE | GROUPED)
        config = AutoConfig.for_model(model_type, **(shape | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    model.save_pretrained(directory)
    if patch is not None:
        change(directory, patch)
    return directory


def change(directory: Path, patch: dict[str, Any]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | patch))


def windows() -> PackedWindows:
    random = np.random.default_rng(1)
    return pack_windows([random.integers(3, 63, length).astype(np.int32) for length in LENGTHS], [])


def alone(directory: Path, packed: PackedWindows) -> dict[str, Tensor]:
    """What transformers computes for each window by itself, with its own attention: the sites of a layer, logits."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    pattern = rf"(.*\.)?(layers|h)\.{LAYER}"
    layer = next(m for n, m in model.named_modules() if re.fullmatch(pattern, n) and "vision" not in n)
    seen: dict[str, list[Tensor]] = {name: [] for name in ("mlp_in", "mlp_out", "resid_post", "logits")}
    last = getattr(layer, "post_feedforward_layernorm", layer.mlp)
    layer.mlp.register_forward_pre_hook(lambda module, args: seen["mlp_in"].append(args[0][0]))
    last.register_forward_hook(lambda module, args, output: seen["mlp_out"].append(output[0]))
    layer.register_forward_hook(lambda module, args, output: seen["resid_post"].append(output[0]))
    with torch.no_grad():
        for ids in packed.input_ids.split(packed.lengths):
            seen["logits"].append(model(ids[None]).logits[0])
    result = {name: torch.cat(parts) for name, parts in seen.items()}
    return result | {"resid_mid": result["resid_post"] - result["mlp_out"]}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | settings}


LLAMA3 = rope("llama3", factor=4.0, original_max_position_embeddings=16, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(("model_type", "settings", "patch"), [
    ("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 1.5}, {}),
    ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0}, {}),
    ("gemma2", {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window": 3}, {"final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}),
    ("gemma3_text", {"sliding_window": 4}, {"sliding_window_pattern": 2, "layer_types": None}),
    ("gemma3_text", {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }}, {}),
    ("gemma3", {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]}, {}),
    ("llama", LLAMA3, {}),
    ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16), {}),
    ("llama", rope("linear", factor=4.0), {}),
    ("llama", rope("proportional", partial_rotary_factor=0.5), {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 0.1}, {}),
    ("llama", {"tie_word_embeddings": True, "attention_dropout": 0.5}, {"rope_parameters": None, "rope_theta": 500.0}),
    ("mistral", {"sliding_window": 6}, {}),
    ("mistral", {"sliding_window": None}, {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, {}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}, {"use_mrope": False}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "attention_bias": True}, {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {}),
    ("gpt2", {"scale_attn_weights": False, "reorder_and_upcast_attn": True}, {}),
    ("gpt2", {"n_inner": 48, "activation_function": "relu", "layer_norm_epsilon": 0.1}, {}),
    ("gpt_neox", {"attention_bias": False, "is_decoder": True, "hidden_act": "relu"}, {}),
    ("gpt_neox", {"use_parallel_residual": False}, {"rope_parameters": None, "rotary_pct": 1.0}),
    ("gpt_neox", rope("linear", factor=2.0, partial_rotary_factor=0.5), {}),
])  # fmt: skip
def test_what_runs_is_what_transformers_computes(
    tmp_path: Path, model_type: str, settings: dict[str, Any], patch: dict[str, Any]
) -> None:
    directory = make(model_type, tmp_path / "model", settings, patch)
    packed, expected = windows(), alone(directory, windows())
    config = ModelConfig(name=str(directory), layer=LAYER, dtype="float32")
    (pair,) = LanguageModel(config).capture(packed)
    full = LanguageModel(config.model_copy(update={"source": "mlp_in"}), full=True)
    (normed,) = full.capture(packed)
    found = {"resid_mid": pair.source, "mlp_out": pair.target, "mlp_in": normed.source, "logits": full.logits(packed)}
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert pair.target.norm() > 0.05 * pair.source.norm()


def test_dynamic_rope_never_sees_a_window_that_changes_the_others(tmp_path: Path) -> None:
    settings = rope("dynamic", factor=4.0) | {"max_position_embeddings": max(LENGTHS)}
    directory = make("llama", tmp_path / "model", settings)
    model = LanguageModel(ModelConfig(name=str(directory), layer=LAYER, dtype="float32"), full=True)
    packed, expected = windows(), alone(directory, windows())
    for _ in range(2):  # the longest window stands beside short ones, and was seen before them
        torch.testing.assert_close(model.logits(packed), expected["logits"], rtol=1e-4, atol=1e-4)
    longer = pack_windows([np.zeros(max(LENGTHS) + 1, np.int32)], [])
    for run in (model.logits, model.capture):
        with pytest.raises(ValueError, match=r"a window of 41 tokens, but .* has 40 positions"):
            run(longer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of a type, made once; each call copies it and changes its config.json."""
    root = tmp_path_factory.mktemp("made")

    def copy(model_type: str, target: Path, patch: dict[str, Any]) -> Path:
        if not (root / model_type).exists():
            make(model_type, root / model_type, {})
        shutil.copytree(root / model_type, target)
        change(target, patch)
        return target

    return copy


LONG = rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=4.0, original_max_position_embeddings=16)


@pytest.mark.parametrize(("model_type", "patch", "words"), [
    ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True", "only false"]),
    ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
    *[(name, {"is_causal": False}, ["is_causal=False", "only true"]) for name in sorted(MODULES)],
    ("gemma3", {"text_config": {"use_bidirectional_attention": True}}, ["use_bidirectional_attention=True"]),
    ("gemma2", {"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping=0.0", "more than 0"]),
    ("gemma2", {"hidden_act": "relu"}, ["hidden_act='relu'", "gelu_pytorch_tanh"]),
    ("gemma2", {"per_layer_config": {"0": {"sliding_window": 7}}}, ["per_layer_config"]),
    ("llama", LONG, ["rope_parameters=", "rope_type default, linear, dynamic"]),
    ("llama", rope("default", partial_rotary_factor=0.5), ["a partial_rotary_factor of 1"]),
    ("llama", {"rope_interleaved": True}, ["rope_interleaved=True", "nothing reads", "llama"]),
    ("llama", {"sliding_window": 8}, ["sliding_window=8"]),
    ("llama", {"embedding_multiplier": 12.0}, ["embedding_multiplier=12.0"]),
    ("llama", {"quantization": {"bits": 4}}, ["quantization={'bits': 4}"]),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, ["auto_map=", "without code"]),
    ("llama", {"return_dict": False}, ["return_dict=False"]),
    ("mistral", {"layer_types": [SLIDING, FULL, FULL]}, ["unknown architecture 'ministral'"]),
    ("qwen2", {"layer_types": [SLIDING] * 3, "use_sliding_window": False}, ["sliding_window, which is None"]),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, ["layer_types=", "full_attention and sliding_attention"]),
    ("gpt2", {"add_cross_attention": True}, ["add_cross_attention=True"]),
    ("gpt_neox", {"head_dim": 4}, ["head_dim=4", "only 8"]),
])  # fmt: skip
def test_what_would_not_be_obeyed_is_refused_by_name(
    tmp_path: Path, made: Any, model_type: str, patch: dict[str, Any], words: list[str]
) -> None:
    directory = made(model_type, tmp_path / "model", patch)
    for call in (check_model, LanguageModel):
        with pytest.raises((ModelError, ConfigError)) as caught:
            call(ModelConfig(name=str(directory), layer=LAYER))
        message = str(caught.value)
        assert all(word in message for word in ["model.name=", *words]), message
        assert "\n" not in message


HUB = {"architectures": ["X"], "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True}
OLD_ROPE = {"rope_scaling": None, "rope_theta": 1e5}
ORDINARY: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": ("llama", OLD_ROPE | {
        "is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "mlp_bias": False,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "_name_or_path": "x",
    }),
    "Llama-3.2": ("llama", {"rope_theta": 5e5, "head_dim": 64, "eos_token_id": [1, 2], "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 1024,
        "rope_type": "llama3",
    }}),
    "Yarn-Llama-2": ("llama", {"max_sequence_length": 4096, "rope_scaling": {
        "factor": 16.0, "original_max_position_embeddings": 128, "type": "yarn", "finetuned": True,
    }}),
    "a fine-tune": ("llama", {"unsloth_fixed": True, "unsloth_version": "2024.9", "tokenizer_padding_side": "right"}),
    "Mistral-7B": ("mistral", {"sliding_window": None, "rope_theta": 1e6, "attention_dropout": 0.0}),
    "Qwen2.5": ("qwen2", {"rope_theta": 1e6, "use_mrope": False, "use_sliding_window": False, "sliding_window": 32768}),
    "Qwen3": ("qwen3", OLD_ROPE | {"attention_bias": False, "max_window_layers": 28, "sliding_window": None}),
    "gpt2": ("gpt2", {
        "n_ctx": 1024, "resid_pdrop": 0.1, "summary_type": "cls_index", "output_past": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }),
    "gpt2-xl": ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    "dolly": ("gpt_neox", {"custom_pipelines": {"text-generation": {"impl": "x"}}, "rotary_pct": 0.25}),
    "alias-gpt2-small": ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    "pythia": ("gpt_neox", {
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0,
    }),
    "gemma-2-9b": ("gemma2", {
        "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_size": 4096, "rope_theta": 1e4,
    }),
    "gemma-3-270m": ("gemma3_text", OLD_ROPE | {
        "_sliding_window_pattern": 6, "rope_local_base_freq": 10000.0, "use_bidirectional_attention": False,
    }),
    "gemma-3-4b": ("gemma3", {
        "boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 256, "image_token_index": 262144,
        "text_config": {
            "model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
    }),
}  # fmt: skip
"""What the config.json of well-known models says beside the shapes."""


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not_refused(tmp_path: Path, name: str) -> None:
    model_type, settings = ORDINARY[name]
    (tmp_path / "config.json").write_text(json.dumps(HUB | settings | {"model_type": model_type}))
    check_fields(name, AutoConfig.from_pretrained(tmp_path))


def write_gguf(directory: Path, architecture: str, fields: dict[str, Any], tensor: str | None = None) -> ModelConfig:
    writer = gguf.GGUFWriter(directory / "m.gguf", architecture)
    common = {"block_count": 1, "embedding_length": 8, "context_length": 64, "attention.head_count": 2}
    for field, value in (common | fields).items():
        key = f"{architecture}.{field}"
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}[type(value)](
            key, value
        )
    writer.add_token_list(["a", "b"])
    blocks = [f"blk.{i}.attn_norm.weight" for i in range((common | fields)["block_count"])]
    for name in ("token_embd.weight", *blocks, *([tensor] if tensor else [])):
        writer.add_tensor(name, np.ones((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelConfig(name=str(directory), gguf_file="m.gguf", layer=0)


@pytest.mark.parametrize(("architecture", "fields", "tensor", "words"), [
    ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, None, "rope.scaling.type='linear'"),
    ("llama", {}, "rope_freqs.weight", "rope_freqs.weight"),
    ("llama", {"expert_count": 8, "expert_used_count": 2}, None, "llama.expert_count=8"),
    ("llama", {"attention.sliding_window": 4096}, None, "llama.attention.sliding_window=4096"),
    ("llama", {"attention.causal": False}, None, "llama.attention.causal=False"),
    ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, None, "rope.scaling.type='yarn'"),
    ("gemma2", {"attn_logit_softcapping": 20.0}, None, "gemma2.attn_logit_softcapping=20.0"),
    ("gemma3", {"block_count": 62}, None, "the scale of the scores in a gemma3 of 62 layers"),
])  # fmt: skip
def test_what_is_dropped_of_a_gguf_file_is_refused_by_name(
    tmp_path: Path, architecture: str, fields: dict[str, Any], tensor: str | None, words: str
) -> None:
    config = write_gguf(tmp_path, architecture, fields, tensor)
    loaded = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    if "rope.scaling.type" in fields:  # transformers would go on with plain ones
        assert loaded["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(ModelError) as caught:
        check_model(config)
    assert words in str(caught.value)
    assert "m.gguf can't be run as it says" in str(caught.value)


@pytest.mark.parametrize(("architecture", "fields"), [
    ("llama", {"rope.freq_base": 1e5, "rope.dimension_count": 4, "vocab_size": 2, "feed_forward_length": 16}),
    ("qwen2", {"rope.scaling.type": "none", "attention.head_count_kv": 1, "rope.scaling.factor": 1.0}),
    ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.key_length": 4}),
    ("gemma3", {"attention.sliding_window": 512, "rope.freq_base_swa": 1e4, "attention.value_length": 4}),
    ("gpt2", {"feed_forward_length": 32, "attention.layer_norm_epsilon": 1e-5}),
])  # fmt: skip
def test_ordinary_gguf_files_are_not_refused(tmp_path: Path, architecture: str, fields: dict[str, Any]) -> None:
    info = check_model(write_gguf(tmp_path, architecture, fields))
    assert info.model_type == {"gemma3": "gemma3_text"}.get(architecture, architecture)


@pytest.mark.parametrize("model_type", sorted(MODULES))
def test_every_field_that_transformers_declares_or_reads_is_listed(model_type: str) -> None:
    """A new version of transformers with a new field fails here, before anybody's activations change."""
    assert HONOURED.keys() == MODULES.keys()
    cls = CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(cls)}
    assert not {field for field in declared if not sorted_in(model_type, field)}
    package = cls.__module__.rpartition(".")[0]
    name = package.rpartition(".")[2]
    source = Path(importlib.import_module(f"{package}.modeling_{name}").__file__ or "").read_text()
    read = re.findall(r"\bconfig\.([a-z]\w*)|getattr\((?:self\.)?config, \"([a-z]\w*)\"", source)
    fields = {cls.attribute_map.get(field, field) for pair in read for field in pair if field}
    beside = [t for t in MODULES if t.startswith(name)]  # one file has the models of both types of Gemma 3
    unlisted = {field for field in fields if not any(sorted_in(t, field) for t in beside)}
    assert not {field for field in unlisted if not hasattr(PretrainedConfig, field)}
