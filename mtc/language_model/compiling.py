"""Compiling what lies between a language model's matrix products, where that is possible."""

from __future__ import annotations

import logging
import os
import shutil
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mtc.devices import is_gpu

logger = logging.getLogger(__name__)


def why_eager(requested: bool | None, device: torch.device) -> str | None:
    """Why a model is not compiled, None if it is; `requested` is `model.compile`."""
    if requested is not None:
        return None if requested else "model.compile=false"
    if not is_gpu(device):
        return "on a CPU"  # where products take most of the time
    missing = _missing_for_triton()
    if missing is not None:
        logger.warning("the language model is not compiled and runs slower: %s", missing)
    return missing


def _missing_for_triton() -> str | None:
    """What compiling for a GPU lacks on this machine, None if nothing.

    Triton compiles its launcher with the C compiler that CC names, else with gcc or clang (its runtime/build.py).
    """
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return "no C compiler"
    try:
        import_module("triton")
    except ImportError as error:
        return f"no Triton: {error}"
    return None


def compile_parts(base: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Fuse what lies between the matrix products: norms and MLPs. All layers share one compiled graph of each.

    Only `forward` is compiled, so that hooks stay outside and never cause a recompilation. Returns the modules with
    what they had as a `forward` of their own, mostly None: `restore` gives it back.
    """
    changed = []
    for name, module in base.named_modules():
        if "norm" in type(module).__name__.lower() or name.endswith(".mlp"):
            changed.append((module, vars(module).get("forward")))
            # A graph break or too many compilations raise; they would otherwise run eager in silence.
            module.forward = torch.compile(module.forward, dynamic=True, fullgraph=True)
    return changed


def restore(forwards: list[tuple[nn.Module, Any]]) -> None:
    for module, own in forwards:
        if own is None:
            del module.forward  # that of its class shows again
        else:
            module.forward = own
