"""The neurons of a layer's MLP, read from the model's files without loading the model: what each looks for, and how
strong it is."""

from __future__ import annotations

import json
import os
import re
from typing import NamedTuple

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor
from transformers.activations import ACT2FN

from mtc.config import ModelConfig
from mtc.language_model.architectures import ModelError, modules_of
from mtc.language_model.check import INDEX, WEIGHTS
from mtc.language_model.weights import loading, model_config_of, prepare_model


class Neurons(NamedTuple):
    """The MLP's neurons as functions of x, [d_model]: the source, of `resid_mid` divided by its root mean square.

    activity = act(directions x + constants), in a gated MLP times (up x + up_constants)
    """

    directions: Tensor
    """[neurons, d_model] float32: what the nonlinearity is applied to, of a gated MLP the gate's rows."""
    constants: Tensor
    """[neurons] float32, added before the nonlinearity."""
    up: Tensor | None
    """[neurons, d_model] float32, of a gated MLP."""
    up_constants: Tensor | None
    """[neurons] float32, of a gated MLP."""
    out_norms: Tensor
    """[neurons] float32, length of what one unit of activity adds to `mlp_out`, up to a factor that all share."""
    act: str
    """The nonlinearity, as transformers names it."""
    divided: bool
    """Whether x is the source divided by its root mean square."""

    def to(self, device: torch.device) -> Neurons:
        gated = None if self.up is None or self.up_constants is None else (self.up, self.up_constants)
        up, up_constants = (part.to(device) for part in gated) if gated else (None, None)
        shared = (part.to(device) for part in (self.directions, self.constants, self.out_norms))
        directions, constants, out_norms = shared
        return self._replace(
            directions=directions, constants=constants, up=up, up_constants=up_constants, out_norms=out_norms
        )

    def activity(self, source: Tensor) -> Tensor:
        """[tokens, neurons] float32, of raw sources [tokens, d_model]."""
        x = source.float()
        if self.divided:
            x = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        active: Tensor = ACT2FN[self.act](x @ self.directions.T + self.constants)
        return active if self.up is None or self.up_constants is None else active * (x @ self.up.T + self.up_constants)


def read_neurons(config: ModelConfig, layer: int, source: str = "resid_mid") -> Neurons:
    """The neurons of a layer's MLP behind the site `source`. For `resid_mid` the norm before the MLP is part of them;
    where that is a LayerNorm, a source's mean is left out of its root mean square, which is exact for residuals whose
    mean is 0. Raises ModelError and ConfigError like `prepare_model`, ModelError if the files hold no such weights.
    """
    model_config = model_config_of(config)
    modules = modules_of(config, model_config.model_type)
    parts = {"gate": modules.neurons, "down": modules.neurons_out, "norm": modules.norm}
    if modules.neurons_gated:
        parts["up"] = modules.neurons_gated
    if modules.mlp_out != "mlp":
        parts["post"] = modules.mlp_out
    with loading(config, report=False):
        # What is above the layers has other names in some checkpoints than in the model that is made of them.
        tensors = _read(config, f"{modules.layers.rpartition('.')[2]}.{layer}", set(parts.values()))
    if missing := [path for path in parts.values() if f"{path}.weight" not in tensors]:
        raise ModelError(f"{config.name}: its files hold no weights {modules.layers}.{layer}.{missing[0]}")

    def linear(name: str) -> tuple[Tensor, Tensor]:
        """[out, in] and [out]: a linear map as one of the normalised source."""
        weight = tensors[f"{parts[name]}.weight"]
        weight = weight.T if modules.transposed else weight
        constant = tensors.get(f"{parts[name]}.bias", weight.new_zeros(len(weight)))
        if source != "resid_mid":
            return weight.contiguous(), constant
        shift = tensors.get(f"{parts['norm']}.bias")
        rows = weight * (tensors[f"{parts['norm']}.weight"] + modules.stored_gain)
        if shift is not None:
            constant, rows = constant + weight @ shift, rows - rows.mean(1, keepdim=True)
        return rows.contiguous(), constant

    down = tensors[f"{parts['down']}.weight"]
    down = down if modules.transposed else down.T  # [neurons, d_model]
    if "post" in parts:
        down = down * (tensors[f"{parts['post']}.weight"] + modules.stored_gain)
    text = model_config.get_text_config()
    act = next(a for n in ("hidden_activation", "hidden_act", "activation_function") if (a := getattr(text, n, None)))
    up, up_constants = linear("up") if "up" in parts else (None, None)
    return Neurons(*linear("gate"), up, up_constants, down.norm(dim=1), act, source == "resid_mid")


def _read(config: ModelConfig, layer: str, paths: set[str]) -> dict[str, Tensor]:
    """Weights and biases of modules of a layer, float32, by the ends of their names: checkpoints give them different
    beginnings."""
    wanted = re.compile(rf"(?:^|\.){re.escape(layer)}\.((?:{'|'.join(map(re.escape, paths))})\.(?:weight|bias))$")
    found: dict[str, Tensor] = {}
    for place in _files(config, wanted):
        with safe_open(place, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if match := wanted.search(key):
                    found[match[1]] = file.get_tensor(key).float()
    return found


def _files(config: ModelConfig, wanted: re.Pattern[str]) -> list[str]:
    """The files that hold tensors with such names. Raises the hub's error if neither they nor an index can be had."""
    path = prepare_model(config)

    def local(name: str) -> str:
        if os.path.isdir(path):
            return os.path.join(path, name)
        return hf_hub_download(path, name, revision=config.revision)

    try:
        alone = local(WEIGHTS)
    except hub_errors.EntryNotFoundError:  # there is none, or without a network none is in the cache
        alone = ""
    if os.path.isfile(alone):
        return [alone]
    with open(local(INDEX)) as file:
        weight_map: dict[str, str] = json.load(file)["weight_map"]
    return [local(name) for name in sorted({name for key, name in weight_map.items() if wanted.search(key)})]
