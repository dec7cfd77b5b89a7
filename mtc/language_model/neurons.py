"""What the neurons of a layer's MLP look for, read from the model's files without loading the model."""

from __future__ import annotations

import json
import os
import re

from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor

from mtc.config import ModelConfig
from mtc.language_model.architectures import ModelError, modules_of
from mtc.language_model.check import INDEX, WEIGHTS
from mtc.language_model.weights import model_config_of, prepare_model


def neuron_directions(config: ModelConfig, layer: int, source: str = "resid_mid") -> Tensor:
    """Each neuron's direction in the normalised source: [neurons, d_model] float32.

    A neuron's nonlinearity is applied to (normalised source) . direction + a constant, where the source is divided by
    its root mean square (around its mean where the model's norm is a LayerNorm). For `resid_mid` the norm's gain is in
    the direction, for `mlp_in` it is in the source. Of a gated MLP these are the gate's rows.

    Raises ModelError and ConfigError like `prepare_model`, ModelError if the files hold no such weights.
    """
    modules = modules_of(config, model_config_of(config).model_type)
    wanted = [f"{modules.layers}.{layer}.{part}.weight" for part in (modules.neurons, modules.norm)]
    bias = f"{modules.layers}.{layer}.{modules.norm}.bias"
    weights, gain, shift = _read(config, [*wanted, bias])
    if weights is None or gain is None:
        raise ModelError(f"{config.name}: its files hold no weights {wanted[0] if weights is None else wanted[1]}")
    rows = weights.float().T if modules.transposed else weights.float()
    if source == "resid_mid":
        rows = rows * (gain.float() + modules.stored_gain)
        if shift is not None:
            rows = rows - rows.mean(1, keepdim=True)  # a LayerNorm's input loses its mean
    return rows.contiguous()


def _read(config: ModelConfig, names: list[str]) -> list[Tensor | None]:
    """Tensors by the ends of their names, which checkpoints give different beginnings; None for those that are not
    there."""
    found: dict[str, Tensor] = {}
    ends = {name: re.compile(rf"(^|\.){re.escape(name)}$") for name in names}
    for path in _files(config, ends):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found |= {name: file.get_tensor(key) for name, end in ends.items() if end.search(key)}
    return [found.get(name) for name in names]


def _files(config: ModelConfig, ends: dict[str, re.Pattern[str]]) -> list[str]:
    """The files that hold the tensors with these names."""
    path = prepare_model(config)

    def local(name: str) -> str | None:
        if os.path.isdir(path):
            return os.path.join(path, name) if os.path.isfile(os.path.join(path, name)) else None
        try:
            return hf_hub_download(path, name, revision=config.revision)
        except hub_errors.EntryNotFoundError:
            return None

    index = local(INDEX)
    if index is None:
        return [alone] if (alone := local(WEIGHTS)) else []
    with open(index) as file:
        weight_map: dict[str, str] = json.load(file)["weight_map"]
    holding = {name for key, name in weight_map.items() if any(end.search(key) for end in ends.values())}
    return [place for name in sorted(holding) if (place := local(name))]
