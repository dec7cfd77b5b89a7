"""What others' files say of a transcoder beside its weights: every field is obeyed, or refused by name.

SAELens keeps the transcoder's own fields at the top of `cfg.json`, and what is known of its use under `metadata`: hook
points named as in TransformerLens (`blocks.5.hook_mlp_out`) and as modules of transformers
(`model.layers.5.mlp.output`). What metadata says of the text that was trained on binds nothing: `dataset_path`,
`context_size`, `prepend_bos`, `seqpos_slice` and all that SAELens itself does not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtc.errors import MtcError
from mtc.language_model import MODULES

ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""Transcoders of SAELens that can be imported."""
FREE = frozenset(("architecture", "d_in", "d_out", "d_sae", "device", "dtype", "metadata"))
"""Fields at the top of cfg.json that are checked elsewhere or bind nothing; weights are used in float32."""
ONLY: dict[str, tuple[Any, ...]] = {
    "apply_b_dec_to_input": (False,),
    "reshape_activations": ("none",),
    "normalize_activations": ("none", "constant_norm_rescale"),
    "activation_fn": ("relu", None),
    "activation_fn_str": ("relu", None),
    "hook_head_index": (None,),
    "hook_head_index_out": (None,),
    "finetuning_scaling_factor": (False, None),
    "rescale_acts_by_decoder_norm": (False, None),
}
"""The values at which a field of cfg.json, wherever it stands in it, is obeyed."""
LOADING = frozenset(("attn_implementation", "device", "device_map", "dtype", "n_devices", "torch_dtype"))
"""Arguments for loading the language model that do not change what a hook holds."""
HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
SOURCES = ("hook_resid_mid", "hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in")
"""Hook points in a block where a transcoder that we can use reads."""

GEMMA_SCOPE_2 = frozenset(
    ("affine_connection", "architecture", "hf_hook_point_in", "hf_hook_point_out", "l0", "model_name", "type", "width")
)
"""Fields of Gemma Scope 2's config.json; which language model was read binds nothing."""


class ImportFailure(MtcError):
    """The files are no transcoder that we can use; the message says why."""


def check_cfg(file: Path, cfg: dict[str, Any]) -> None:
    """Raise ImportFailure for a cfg.json that asks for what our transcoders do not compute."""
    architecture = cfg.get("architecture")
    if architecture not in ARCHITECTURES:
        why = "it has no threshold" if "topk" in str(architecture) else "it is no transcoder"
        raise ImportFailure(
            f"{file}: architecture={architecture!r} can't be used, {why}; usable are {', '.join(ARCHITECTURES)}"
        )
    for part in (cfg, metadata_of(file, cfg)):
        for field, usable in ONLY.items():
            if field in part:
                _one_of(file, field, part[field], usable)
    for field in sorted(cfg.keys() - FREE - ONLY.keys()):
        if cfg[field]:  # what is off changes nothing
            why = "SAELens 6 keeps it in metadata; load and save it there" if "hook" in field else "nobody knows it"
            raise ImportFailure(f"{file}: {field}={cfg[field]!r} can't be used: {why}")
    for field, value in (metadata_of(file, cfg).get("model_from_pretrained_kwargs") or {}).items():
        if value and field not in (*LOADING, "revision"):
            raise ImportFailure(
                f"{file}: model_from_pretrained_kwargs has {field}={value!r}, which changes what hooks hold; ours hold "
                "what the model computes"
            )


def check_sizes(file: Path, cfg: dict[str, Any], sizes: Mapping[str, int]) -> None:
    """Raise ImportFailure if cfg.json gives other sizes than the tensors have."""
    for field, size in sizes.items():
        if cfg.get(field, size) != size:
            raise ImportFailure(f"{file}: {field}={cfg[field]!r}, but the tensors have {size}")


def read_gemma_scope_2_config(file: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """What Gemma Scope 2's config.json says of layer, source, activation function and k, as nested values of the
    configuration. Raises ImportFailure for what is no transcoder of one layer, and for fields that nobody knows."""
    for field, value in {"type": "transcoder", "architecture": "jump_relu"}.items():
        if cfg.get(field) != value:
            raise ImportFailure(f"{file}: {field}={cfg.get(field)!r} can't be used, only {value}")
    for field in sorted(cfg.keys() - GEMMA_SCOPE_2):
        if cfg[field]:
            raise ImportFailure(f"{file}: {field}={cfg[field]!r} can't be used: nobody knows it")
    if not isinstance(cfg.get("affine_connection", False), bool):
        raise ImportFailure(f"{file}: affine_connection={cfg['affine_connection']!r} is neither true nor false")
    hooks = {"hf_hook_name": cfg.get("hf_hook_point_in"), "hf_hook_name_out": cfg.get("hf_hook_point_out")}
    for field, name in zip(("hf_hook_point_in", "hf_hook_point_out"), hooks.values(), strict=True):
        if not name:
            raise ImportFailure(f"{file}: {field} is missing")
    known = read_sites(file, hooks | {"model_name": "gemma-3"})
    known["transcoder"]["activation"] = "jumprelu"
    if (k := cfg.get("l0")) is not None:
        if not _counts([k]):
            raise ImportFailure(f"{file}: l0={k!r} is no number of features")
        known["transcoder"]["k"] = k
    return known


def metadata_of(file: Path, cfg: dict[str, Any]) -> dict[str, Any]:
    """`metadata` of cfg.json; ImportFailure where it is none, or a part of it that is read is no mapping."""
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ImportFailure(f"{file}: metadata is no mapping")
    for field in ("mtc", "training_architecture_details", "model_from_pretrained_kwargs"):
        if not isinstance(metadata.get(field) or {}, dict):
            raise ImportFailure(f"{file}: metadata.{field}={metadata[field]!r} is no mapping")
    return metadata


def read_sites(file: Path, metadata: Mapping[str, Any], norm: str = "none", skip: bool = False) -> dict[str, Any]:
    """What hook names say of layer, source and input norm, as nested values of the configuration; nothing where they
    do not say it. `norm` is SAELens's `normalize_activations`.

    Raises ImportFailure for hooks that are not ours or that contradict each other.
    """
    names = {
        name: metadata.get(name) or "" for name in ("hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out")
    }
    for field, name in names.items():
        if not isinstance(name, str):
            raise ImportFailure(f"{file}: {field}={name!r} is no name")
    hook, out, module, module_out = names.values()
    if hook and hook == out:
        raise ImportFailure(f"{file}: hook_name and hook_name_out are both {hook!r}: this is no transcoder")
    layer = _one_layer(file, metadata, names)
    known: dict[str, Any] = {"model": {} if layer is None else {"layer": layer}, "transcoder": {}}
    rows = list(MODULES.values())
    if "gemma" in str(metadata.get("model_name", "")).lower():
        rows = [MODULES["gemma2"]]  # what Llama calls the MLP's norm belongs to the attention there
    if (out and not out.endswith(".hook_mlp_out")) or (
        module_out and not _is_in(module_out, rows, "mlp_out", "output")
    ):
        field = "hook_name_out" if out and not out.endswith(".hook_mlp_out") else "hf_hook_name_out"
        raise ImportFailure(
            f"{file}: {field}={names[field]!r} is not the MLP's output, and nothing else can be imported"
        )
    if norm == "constant_norm_rescale" and skip:
        raise ImportFailure(
            f"{file}: normalize_activations={norm!r} with a skip connection, which reads what is not normalised; our "
            "transcoders normalise for both"
        )
    point = match[2] if (match := HOOK.fullmatch(hook)) else ""
    if point and point not in SOURCES:
        raise ImportFailure(
            f"{file}: hook_name={hook!r} can't be read from; usable are {', '.join(SOURCES)} of a block"
        )
    # `hook_mlp_in` stands for the norm's input and, in some folders, its output: there only the module says.
    told = {"resid_mid": point == "hook_resid_mid", "mlp_in": point == "mlp.hook_in"}
    if module:
        before, after = _is_in(module, rows, "norm", "input"), _is_in(module, rows, "norm", "output")
        if not (before and point in ("", "hook_resid_mid", "hook_mlp_in")) and not (
            after and point in ("", "mlp.hook_in", "hook_mlp_in")
        ):
            raise ImportFailure(f"{file}: hf_hook_name={module!r} is not where hook_name={hook!r} is")
        told = {"resid_mid": before, "mlp_in": after}
    for source, is_told in told.items():
        if is_told:
            known["model"]["source"] = source
            known["transcoder"]["input_norm"] = "rms" if norm == "constant_norm_rescale" else "none"
    if point == "ln2.hook_normalized" and norm == "none":
        known["model"]["source"], known["transcoder"]["input_norm"] = "resid_mid", "rms"
    return known


def read_groups(file: Path, metadata: Mapping[str, Any], features: int) -> dict[str, Any]:
    """Nested groups and active features: of our own exports, or of SAELens's Matryoshka training.

    Raises ImportFailure for what is no number of features.
    """
    ours = metadata.get("mtc") or {}
    details = metadata.get("training_architecture_details") or {}
    found: dict[str, Any] = {}
    if (k := ours.get("k") or details.get("k")) is not None:
        if not _counts([k]) or k > features:
            raise ImportFailure(f"{file}: k={k!r} is no number of the {features} features")
        found["k"] = k
    if groups := ours.get("group_sizes"):
        if not _counts(groups):
            raise ImportFailure(f"{file}: group_sizes={groups!r} are no numbers of features")
        found["group_sizes"] = groups
    elif widths := details.get("matryoshka_widths"):
        ends = [*widths, features] if isinstance(widths, list) and widths[-1] != features else widths
        if not _counts(ends) or any(b <= a for a, b in pairwise(ends)):
            raise ImportFailure(f"{file}: matryoshka_widths={widths!r} do not rise to the {features} features")
        found["group_sizes"] = [b - a for a, b in pairwise([0, *ends])]
    return found


def _one_of(file: Path, field: str, value: Any, usable: tuple[Any, ...]) -> None:
    if not any(value is v or (isinstance(v, str) and value == v) for v in usable):
        words = [v if isinstance(v, str) else {False: "false", None: "null"}[v] for v in usable]
        raise ImportFailure(f"{file}: {field}={value!r} can't be used, only {' or '.join(words)}")


def _one_layer(file: Path, metadata: Mapping[str, Any], names: Mapping[str, str]) -> int | None:
    """The layer that all hooks are of."""
    layers: dict[str, int] = {}
    for field, name in names.items():
        if match := re.search(r"(?:^|\.)(?:blocks|layers|h)\.(\d+)(?:\.|$)", name):
            layers[f"{field}={name!r}"] = int(match[1])
    for field in ("hook_layer", "hook_layer_out"):
        if isinstance(metadata.get(field), int):
            layers[f"{field}={metadata[field]}"] = metadata[field]
    if len(set(layers.values())) > 1:
        raise ImportFailure(
            f"{file}: {' and '.join(layers)} are of several layers; a transcoder reads and imitates the MLP of one"
        )
    return next(iter(layers.values()), None)


def _is_in(name: str, rows: list[Any], module: str, end: str) -> bool:
    """Whether a hook of transformers is the `end`, input or output, of one of the architectures' modules of a kind."""
    return name.endswith(tuple(f".{getattr(row, module)}.{end}" for row in rows))


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
