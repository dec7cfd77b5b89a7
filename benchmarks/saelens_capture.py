"""SAELens's ActivationsStore as a worker for benchmarks/stream.py; runs in the peers' environment, without `mtc`.

Reads one JSON object a line: {"cmd": "make", "path", "layer", "texts", "context", "model_class"}, then
{"cmd": "step", "tokens"}; answers {"seconds", "tokens"}.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def make(path: str, layer: int, texts: list[str], context: int, model_class: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of both sites' activations, from one forward pass that stops behind the layer."""
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(path)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    width = hf.config.hidden_size
    if model_class == "HookedTransformer":
        model: Any = hooked_transformer(hf, tokenizer)
        hooks = [f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_mlp_out"]
    else:
        hooks = [f"model.layers.{layer}.post_attention_layernorm", f"model.layers.{layer}.mlp"]
        model = HookedProxyLM(hf, tokenizer, hook_names=hooks)
    store = ActivationsStore.from_config_multi_hook(
        model,
        dataset=Dataset.from_dict({"text": texts}),
        hook_names=hooks,
        hook_d_ins=dict.fromkeys(hooks, width),
        context_size=context,
        n_batches_in_buffer=32,
        store_batch_size_prompts=16,
        train_batch_size_tokens=1024,
        total_training_tokens=len(texts),  # only for a warning
    )
    return store.get_multi_hook_data_loader()


def hooked_transformer(hf: Any, tokenizer: Any) -> HookedTransformer:
    """What from_pretrained_no_processing makes of a Llama; that function itself needs the model hub."""
    c = hf.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=2048,
        d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=int(c.rope_parameters["rope_theta"]),
        rotary_dim=c.hidden_size // c.num_attention_heads,
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedTransformer(config, tokenizer)
    state = convert_llama_weights(hf, config)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():  # otherwise this would time another model
        worst = (model(ids, prepend_bos=False) - hf(ids).logits).abs().max() / hf(ids).logits.abs().max()
    if worst > 1e-3:
        raise RuntimeError(f"HookedTransformer differs from transformers by {worst:.2e}")
    return model


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; answers must stay alone
    torch.set_num_threads(2)
    batches: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        tokens = 0
        if command.pop("cmd") == "make":
            batches = make(**command)
        else:
            while tokens < command["tokens"]:
                with torch.no_grad():
                    tokens += len(next(iter(next(batches).values())))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
