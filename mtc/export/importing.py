"""Others' transcoders as runs of ours: Gemma Scope's `params.npz`, Gemma Scope 2's and SAELens's folders.

Read are JumpReLU and plain ReLU transcoders. What they read must be one of our sites, which the file says or the user;
what they write must be `mlp_out`. Top-k activations have no threshold and are refused, and so are autoencoders, which
read and write one site.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mtc.config import RunConfig, to_yaml
from mtc.export.card import read_card
from mtc.export.import_metadata import (
    ImportFailure,
    check_cfg,
    check_sizes,
    metadata_of,
    read_gemma_scope_2_config,
    read_groups,
    read_sites,
)
from mtc.language_model import ModelInfo
from mtc.storage import RunDirectory, RunError
from mtc.transcoder import MatryoshkaTranscoder, transcoder_shape

LAYER_NORM = ("gpt2", "gpt_neox")
"""Architectures whose norm before the MLP is a LayerNorm, not an RMS norm."""
_AUTOENCODERS = re.compile(r"gemma-scope-[^/]*-(?:res|att|mlp)(?:-canonical)?(?=/)")
"""Repositories of Gemma Scope whose `params.npz` has the same arrays as a transcoder's."""


class Imported(NamedTuple):
    """A transcoder of another library, as it was read; all tensors are float32."""

    W_enc: Tensor
    """[features, d_source] float32, encoder rows."""
    b_enc: Tensor
    """[features] float32, encoder biases."""
    W_dec: Tensor
    """[features, d_target] float32, decoder rows."""
    b_dec: Tensor
    """[d_target] float32, decoder bias."""
    threshold: Tensor
    """[features] float32, pre-activation above which each feature is active; 0 for a plain ReLU."""
    W_skip: Tensor | None
    """[d_target, d_source] float32, skip connection; None without one."""
    normalised: bool
    """Whether the transcoder reads what the language model's own norm divided, which is our `rms` only if that is an
    RMS norm."""
    known: dict[str, Any]
    """What the files say of the configuration: nested values for `jobs.command_line.parse_command_line`."""
    origin: dict[str, str]
    """Where the transcoder comes from: format, names and sha256 of the files."""


def read_gemma_scope(path: str) -> Imported:
    """Read Gemma Scope's `params.npz`, or the directory that holds it. Raises ImportFailure for a file of another
    layout.

    Gemma Scope's transcoders read the residual stream divided by its root mean square, before the norm's gain: our
    `resid_mid` with `input_norm: rms`, unless a card that we exported beside the file says what it reads. Layer and k
    are taken from the path where it says them (`layer_5`, `average_l0_59`).
    """
    file = _local(path)
    file = file / "params.npz" if file.is_dir() else file
    if match := _AUTOENCODERS.search(str(file.absolute())):
        raise ImportFailure(
            f"{file}: {match[0]} holds autoencoders, which read and write one site; this is no transcoder"
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise TypeError("it is a single array")
            found = {name: arrays[name] for name in arrays.files}
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    except Exception as error:  # of zipfile, zlib, tokenize, ast or NumPy, whatever the damage meets first
        raise ImportFailure(f"{file} is not a readable npz file: {type(error).__name__}: {error}") from None
    tensors = _checked(file, tensors, {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"})
    readme = file.with_name("README.md")
    card = read_card(readme)
    known: dict[str, Any] = (
        read_sites(file, card) if card else {"model": {"source": "resid_mid"}, "transcoder": {"input_norm": "rms"}}
    )
    known["model"] = _in_path(file, "layer", r"layer_(\d+)") | known["model"]
    known["transcoder"] |= _in_path(file, "k", r"average_l0_(\d+)") | read_groups(file, card, len(tensors["b_enc"]))
    origin = {"format": "gemma-scope-npz"} | _digests(file) | (_digests(readme) if card else {})
    return _imported(tensors, known["transcoder"].get("input_norm") == "rms", known, origin)


def read_saelens(path: str) -> Imported:
    """Read SAELens's folder of `cfg.json` and `sae_weights.safetensors`. Raises ImportFailure for what is no usable
    transcoder."""
    config_file, weights_file, cfg, tensors = _read_folder(path, "cfg.json", "sae_weights.safetensors", "SAELens")
    check_cfg(config_file, cfg)
    skip, jump = "skip" in cfg["architecture"], "jumprelu" in cfg["architecture"]
    names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if jump else set()) | ({"W_skip"} if skip else set())
    tensors = _checked(weights_file, tensors, names)
    tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    check_sizes(config_file, cfg, {"d_in": d_in, "d_out": d_out, "d_sae": d_sae})
    metadata = metadata_of(config_file, cfg)
    known = read_sites(config_file, metadata, cfg.get("normalize_activations", "none"), skip)
    known["transcoder"] |= read_groups(config_file, metadata, len(tensors["b_enc"]))
    if revision := (metadata.get("model_from_pretrained_kwargs") or {}).get("revision"):
        known["model"]["revision"] = revision
    normalised = str(metadata.get("hook_name")).endswith(".hook_normalized")
    origin = {"format": "saelens"} | _digests(config_file) | _digests(weights_file)
    return _imported(tensors, normalised, known, origin)


def read_gemma_scope_2(path: str) -> Imported:
    """Read Gemma Scope 2's folder of `config.json` and `params.safetensors`. Raises ImportFailure for what is no usable
    transcoder.

    Its transcoders read what the norm before the MLP returns, our `mlp_in`; the affine skip connection is stored as
    [d_source, d_target] there.
    """
    config_file, weights_file, cfg, tensors = _read_folder(path, "config.json", "params.safetensors", "Gemma Scope 2")
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    known = read_gemma_scope_2_config(config_file, cfg)
    skip = {"affine_skip_connection"} if cfg.get("affine_connection") else set()
    _check_names(weights_file, tensors, {"w_enc", "b_enc", "w_dec", "b_dec", "threshold"} | skip)
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if skip:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    tensors = _checked(weights_file, tensors, set(tensors))
    check_sizes(config_file, cfg, {"width": len(tensors["b_enc"])})
    origin = {"format": "gemma-scope-2"} | _digests(config_file) | _digests(weights_file)
    return _imported(tensors, False, known, origin)


def write_run(imported: Imported, config: RunConfig, info: ModelInfo, run: RunDirectory) -> None:
    """Make a finished run of an imported transcoder: config.yaml, transcoder.safetensors and import.json.

    Raises ImportFailure if the configuration does not fit the weights or the model, RunError if the run exists.
    """
    if run.exists():
        raise RunError(f"{run.url} exists already; give another output.run_id")
    features, d_source = imported.W_enc.shape
    d_target = imported.W_dec.shape[1]
    settings = config.transcoder
    if settings.num_features != features:
        raise ImportFailure(
            f"transcoder.group_sizes={list(settings.group_sizes)} sum to {settings.num_features}, "
            f"but the dictionary has {features} features"
        )
    if settings.input_norm not in ("rms", "none"):
        raise ImportFailure(
            f"transcoder.input_norm={settings.input_norm} can't be that of an import: give model.source, and rms "
            "if the transcoder reads that divided by its root mean square, else none"
        )
    if imported.normalised and info.model_type in LAYER_NORM:
        raise ImportFailure(
            f"the transcoder reads what the norm before the MLP divided, and the norm of {config.model.name} subtracts "
            "the mean first, which ours does not"
        )
    for field, value in imported.known["model"].items():
        if getattr(config.model, field) != value:
            raise ImportFailure(f"model.{field}={getattr(config.model, field)}, but the files say {value}")
    if settings.skip != (imported.W_skip is not None):
        raise ImportFailure(f"transcoder.skip={settings.skip}, but the files say {imported.W_skip is not None}")
    if len(config.model.sites) > 1:
        raise ImportFailure(f"model.layers names {len(config.model.sites)} layers; an import has one")
    if config.sweep:
        raise ImportFailure(f"sweep asks for {len(config.sweep)} transcoders; an import is one")
    if {d_source, d_target} != {info.d_model}:
        raise ImportFailure(
            f"the transcoder maps {d_source} to {d_target} dimensions, but {config.model.name} has {info.d_model}"
        )
    transcoder = MatryoshkaTranscoder(transcoder_shape(config, d_source, d_target))
    if transcoder.activation.thresholds == "none":
        raise ImportFailure(
            f"transcoder.activation={settings.activation} can't be that of an import: it has thresholds"
        )
    is_one = transcoder.activation.thresholds == "calibrated" and len(imported.threshold.unique()) == 1
    threshold = imported.threshold[0] if is_one else imported.threshold
    weights = {name: getattr(imported, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")}
    state = transcoder.state_dict() | {name: value for name, value in weights.items() if value is not None}
    transcoder.load_state_dict(state | {"threshold": threshold})
    run.write("config.yaml", to_yaml(config))
    run.write("transcoder.safetensors", transcoder.to_bytes())
    run.write("import.json", json.dumps(imported.origin, indent=1))
    run.publish()


def _read_folder(
    path: str, config: str, weights: str, kind: str
) -> tuple[Path, Path, dict[str, Any], dict[str, Tensor]]:
    """The files of a folder of one configuration and its weights, and what they hold. Raises ImportFailure that names
    the `kind` for what can't be read."""
    folder = _local(path)
    config_file, weights_file = folder / config, folder / weights
    try:
        cfg = json.loads(config_file.read_text())
        tensors = load_file(weights_file)
        if not isinstance(cfg, dict):
            raise TypeError(f"{config} is no mapping")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ImportFailure(f"{folder} is not a readable {kind} folder: {error}") from None
    return config_file, weights_file, cfg, tensors


def _local(path: str) -> Path:
    if "://" in path:
        raise ImportFailure(f"--import {path}: imports are read from local directories; copy the files to one")
    return Path(path)


def _check_names(file: Path, tensors: dict[str, Tensor], names: set[str]) -> None:
    parts = [("lacks", names - tensors.keys()), ("also holds", tensors.keys() - names)]
    wrong = [f"{verb} {', '.join(sorted(some))}" for verb, some in parts if some]
    if wrong:
        raise ImportFailure(f"{file} is no transcoder of this format: it {' and '.join(wrong)}")


def _checked(file: Path, tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Tensors in the layout of both formats, W_enc [d_source, features], in float32; ImportFailure for wrong names,
    kinds, shapes or values."""
    _check_names(file, tensors, names)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ImportFailure(f"{file}: {name} holds {tensor.dtype}, no floating-point numbers")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if tensors["W_enc"].dim() != 2 or tensors["W_dec"].dim() != 2:
        raise ImportFailure(f"{file}: W_enc and W_dec must be matrices")
    (d_source, features), d_target = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    expected = {
        "W_enc": (d_source, features),
        "W_dec": (features, d_target),
        "b_enc": (features,),
        "b_dec": (d_target,),
        "threshold": (features,),
        "W_skip": (d_target, d_source),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ImportFailure(f"{file}: {name} has the shape {tuple(tensor.shape)}, expected {expected[name]}")
        if not bool(tensor.isfinite().all()):
            raise ImportFailure(f"{file}: {name} holds values that are not finite")
    return tensors


def _imported(tensors: dict[str, Tensor], normalised: bool, known: dict[str, Any], origin: dict[str, str]) -> Imported:
    known["transcoder"].setdefault("group_sizes", [len(tensors["b_enc"])])
    known["transcoder"]["skip"] = "W_skip" in tensors
    known["transcoder"]["rank"] = "activation"  # thresholds are as they come
    known["optimizer"] = {"warmup_steps": 0}  # nothing is trained
    return Imported(
        W_enc=tensors["W_enc"].T.contiguous(),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        W_skip=tensors.get("W_skip"),
        normalised=normalised,
        known=known,
        origin=origin,
    )


def _in_path(file: Path, field: str, pattern: str) -> dict[str, int]:
    """The number that `pattern` finds in the name of one of the directories above."""
    matches = [match for part in file.absolute().parts if (match := re.fullmatch(pattern, part))]
    return {field: int(matches[-1][1])} if matches else {}


def _digests(file: Path) -> dict[str, str]:
    with file.open("rb") as content:
        return {file.name: hashlib.file_digest(content, "sha256").hexdigest()}
