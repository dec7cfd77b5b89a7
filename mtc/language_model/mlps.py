"""What each layer's MLP reads and writes, seen while a pass runs, and replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from mtc.language_model.architectures import Modules


class Sources(NamedTuple):
    """What a layer's MLP reads, before and after its norm, both [rows, tokens, d_model]."""

    resid_mid: Tensor
    mlp_in: Tensor


Visit = Callable[[Sources, Tensor], Tensor | None]
"""From what an MLP reads and writes, what is added to the residual stream instead, [rows, tokens, d_model]; None for
what it writes."""


class Mlps:
    """The MLPs of a model's layers; in a `parallel` block they run beside attention."""

    def __init__(self, layers: Any, modules: Modules, parallel: bool):
        self._layers, self._modules, self._parallel = list(layers), modules, parallel
        self._lock = threading.RLock()

    @property
    def norms(self) -> list[nn.Module]:
        """The norm before the MLP of each layer."""
        return [layer.get_submodule(self._modules.norm) for layer in self._layers]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def visited(self, visits: Mapping[int, Visit]) -> Iterator[None]:
        """Inside, each visit of a layer is called when its MLP has run, with what it reads and writes. Threads take
        turns: hooks are of a model, not of a pass."""
        with self._lock:
            yield from self._visited(visits)

    def _visited(self, visits: Mapping[int, Visit]) -> Iterator[None]:
        hooks: list[Any] = []
        for number, visit in visits.items():
            layer, seen = self._layers[number], dict[str, Any]()
            for path, hook in (
                (self._modules.attention, _after_attention(seen) if self._parallel else None),
                (self._modules.norm, _after_norm(seen)),
                (self._modules.mlp_out, _after_mlp(seen, visit)),
            ):
                if hook is not None:
                    hooks.append(layer.get_submodule(path).register_forward_hook(hook))
        try:
            yield
        finally:
            for each in hooks:
                each.remove()


def _after_attention(seen: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen["attention"] = output[0]

    return hook


def _after_norm(seen: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        # A parallel block's norm reads the layer's input; attention ran before and was not added yet.
        attention = seen.pop("attention", None)
        seen["sources"] = Sources(args[0] if attention is None else args[0] + attention, output)

    return hook


def _after_mlp(seen: dict[str, Any], visit: Visit) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        instead = visit(seen.pop("sources"), output)
        return None if instead is None else instead.to(output.dtype)

    return hook
