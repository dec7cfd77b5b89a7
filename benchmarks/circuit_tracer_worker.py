"""circuit-tracer as a worker for benchmarks/circuits.py; runs in an environment of its own (`make circuits-peer`),
without `mtc`.

Reads one JSON object a line, answers one:

- {"cmd": "make", "model", "transcoders", "ids", "logits"}: the replacement model of a directory of transformers and an
  exported set of transcoders -> {"versions"}; `logits` is a safetensors file of the language model's logits at the last
  of the ids, which what TransformerLens loaded must repeat.
- {"cmd": "attribute", "ids", "batch", "out"}: the graph with all features -> {"seconds", "cpu_seconds"}, and if `out`
  is not null its tensors, influence, scores and pruning in that safetensors file.
- {"cmd": "check", "graph", "features"}: a graph's JSON through the models of circuit-tracer's viewer, and the files of
  its features, as its viewer finds them, likewise -> {"nodes", "links", "features"}.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.frontend.feature_models import Model as Feature
from circuit_tracer.frontend.graph_models import Model as GraphFile
from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import TranscoderSet, load_transcoder_set
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights, convert_llama_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CLOSE = 1e-3
"""Of the largest logit."""


def make(model: str, transcoders: str, ids: list[int], logits: str) -> Any:
    """What `from_pretrained_and_transcoders` makes; that function itself knows models of the hub alone."""
    raw = json.loads((Path(model) / "config.json").read_text())
    # Written by transformers 5, whose name of this the older one here does not read.
    theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10000.0))
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, rope_theta=theta).eval()
    gemma = raw["model_type"] == "gemma2"
    config = HookedTransformerConfig(**_gemma2(hf.config) if gemma else {}, **_common(hf.config, raw["model_type"]))
    made = TransformerLensReplacementModel(config)
    made.tokenizer = _tokenizer(Path(model))  # not by the constructor, which wants one that the hub has
    state = (convert_gemma_weights if gemma else convert_llama_weights)(hf, config)
    made.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=False, center_unembed=False,
                                     fold_value_biases=False)  # fmt: skip
    made._configure_replacement_model(_transcoders(Path(transcoders)))
    with torch.no_grad():
        found, expected = made(torch.tensor(ids)[None], prepend_bos=False)[0, -1], load_file(logits)["logits"]
    worst = float((found - expected).abs().max() / expected.abs().max())
    if worst > CLOSE:
        raise RuntimeError(f"TransformerLens's logits differ from transformers' by {worst:.2e} of the largest")
    return made


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Its class in the files is one of transformers 5."""
    about = json.loads((directory / "tokenizer_config.json").read_text())
    special = {name: about[name] for name in ("bos_token", "eos_token", "pad_token") if about.get(name)}
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **special)


def _common(c: Any, model_type: str) -> dict[str, Any]:
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "n_layers": c.num_hidden_layers,
        "d_model": c.hidden_size,
        "n_ctx": 1024,
        "d_head": head,
        "n_heads": c.num_attention_heads,
        "n_key_value_heads": c.num_key_value_heads,
        "d_mlp": c.intermediate_size,
        "d_vocab": c.vocab_size,
        "act_fn": "gelu_pytorch_tanh" if model_type == "gemma2" else "silu",
        "eps": c.rms_norm_eps,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": int(c.rope_theta),
        "rotary_dim": head,
        "rotary_adjacent_pairs": False,
        "gated_mlp": True,
        "final_rms": True,
        "model_name": model_type,
        "original_architecture": "Gemma2ForCausalLM" if model_type == "gemma2" else "LlamaForCausalLM",
        "dtype": torch.float32,
        "device": "cpu",
    }


def _gemma2(c: Any) -> dict[str, Any]:
    return {
        "use_attn_scale": True,
        "attn_scale": math.sqrt(c.query_pre_attn_scalar),
        "use_local_attn": True,
        "window_size": c.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in c.layer_types],
        "attn_scores_soft_cap": c.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": c.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
    }


def _transcoders(directory: Path) -> TranscoderSet:
    config = yaml.safe_load((directory / "config.yaml").read_text())
    hooks = {name: config[name] for name in ("scan", "feature_input_hook", "feature_output_hook")}
    paths = {int(file.stem.removeprefix("layer_")): str(file) for file in directory.glob("layer_*.safetensors")}
    cpu = torch.device("cpu")
    return load_transcoder_set(paths, device=cpu, lazy_encoder=False, lazy_decoder=False, **hooks)


def trace(model: Any, ids: list[int], batch: int, out: str | None) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    graph = attribute(torch.tensor(ids), model, batch_size=batch)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    if out is not None:
        weights = torch.zeros(len(graph.adjacency_matrix))
        weights[-len(graph.logit_targets) :] = graph.logit_probabilities
        pruned = prune_graph(graph)
        tensors = {
            "features": graph.active_features[graph.selected_features],
            "activation": graph.activation_values[graph.selected_features],
            "adjacency": graph.adjacency_matrix,
            "logits": graph.logit_token_ids,
            "probabilities": graph.logit_probabilities,
            "influence": compute_node_influence(graph.adjacency_matrix, weights),
            "scores": torch.tensor(compute_graph_scores(graph)),
            "nodes": pruned.node_mask,
            "edges": pruned.edge_mask,
        }
        save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, out)
    return spent


def check(graph: str, features: str) -> dict[str, int]:
    """Raises what pydantic raises for a field that is wrong, KeyError for a feature that is not there."""
    made = GraphFile.model_validate_json(Path(graph).read_text())
    index = json.loads(gzip.decompress((Path(features) / "index.json.gz").read_bytes()))
    seen = 0
    for node in made.nodes:
        if node.feature_type == "cross layer transcoder":
            layer, feature = unpair(node.feature)
            offsets, file = index[str(layer)]["offsets"], Path(features) / index[str(layer)]["filename"]
            with file.open("rb") as opened:
                opened.seek(offsets[feature])
                part = opened.read(offsets[feature + 1] - offsets[feature])
            size = int.from_bytes(part[:4], "little")
            about = Feature.model_validate_json(gzip.decompress(part[4 : 4 + size]))
            if (about.index, str(layer)) != (feature, node.layer):
                raise ValueError(f"feature {feature} of layer {layer} is feature {about.index} in the files")
            seen += 1
    return {"nodes": len(made.nodes), "links": len(made.links), "features": seen}


def unpair(number: int) -> tuple[int, int]:
    """As `cantorUnpair` of the viewer."""
    w = int((math.sqrt(8 * number + 1) - 1) / 2)
    y = number - (w * w + w) // 2
    return w - y, y


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; answers must stay alone
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    model: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        command = order.pop("cmd")
        if command == "make":
            model = make(**order)
            names = ("circuit-tracer", "transformer-lens", "transformers", "torch")
            answer: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in names}}
        elif command == "attribute":
            answer = trace(model, **order)
        else:
            answer = check(**order)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
