"""The sites of the layers that are read: hooks that collect them in a forward pass, and replace an MLP's output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from mtc.config import LayerConfig
from mtc.language_model.architectures import Modules

Replace = Callable[[Tensor, Tensor], Tensor]
"""From source and mlp_out, both [tokens, d_model], what is added to the residual stream instead of mlp_out."""


class SitePair(NamedTuple):
    """Raw activations of one layer at the transcoder's two sites."""

    source: Tensor
    """[tokens, d_model] in the model's dtype: what the transcoder reads."""
    target: Tensor
    """[tokens, d_model] in the model's dtype: what the transcoder reconstructs."""


class _AllRead(BaseException):
    """Ends a forward pass in which nothing more is to be read. No Exception: those of a pass may be a compiler's."""


class Sites:
    """Where a model's layers are read; `layers` are all of them."""

    def __init__(self, layers: Sequence[nn.Module], modules: Modules, sites: Sequence[LayerConfig], parallel: bool):
        read = [layers[own.layer] for own in sites]
        self._sites, self._parallel = sites, parallel
        self.norms = [layer.get_submodule(modules.norm) for layer in read]
        """The norm before the MLP of each layer that is read."""
        self._mlps = [layer.get_submodule(modules.mlp_out) for layer in read]
        self._attentions = [layer.get_submodule(modules.attention) for layer in read]

    @contextmanager
    def watch(
        self, replace: Replace | None = None, at: int = 0, only: Collection[int] | None = None
    ) -> Iterator[list[dict[str, Tensor]]]:
        """Collect the sites of the forward pass that runs inside, one dict by name for each layer that is read, and
        `replace` the MLP's output of the one with the number `at`.

        With `only`, the layers of these numbers are collected, and the pass ends behind the highest of them unless that
        is the highest of all.
        """
        seen: list[dict[str, Tensor]] = [{} for _ in self._sites]
        highest = max(range(len(self._sites)) if only is None else only, key=lambda i: self._sites[i].layer)
        ends = any(sites.layer > self._sites[highest].layer for sites in self._sites)
        hooks = []
        for i, sites in enumerate(self._sites):
            if only is not None and i not in only:
                continue
            if self._parallel:
                hooks.append(self._attentions[i].register_forward_hook(_after_attention(seen[i])))
            hooks.append(self.norms[i].register_forward_hook(_after_norm(seen[i], self._parallel)))
            here = replace if i == at else None
            hooks.append(self._mlps[i].register_forward_hook(_after_mlp(seen[i], sites.source, sites.target, here)))
            if ends and i == highest:
                hooks.append(self._mlps[i].register_forward_hook(_end))
        try:
            yield seen
        except _AllRead:
            pass
        finally:
            for hook in hooks:
                hook.remove()


def _end(module: nn.Module, args: Any, output: Any) -> None:
    raise _AllRead


def _after_attention(seen: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen["attention"] = output[0][0]

    return hook


def _after_norm(seen: dict[str, Tensor], parallel: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        # A parallel block's norm reads the layer's input; attention ran before and was not added yet.
        seen["resid_mid"] = args[0][0] + seen.pop("attention") if parallel else args[0][0]
        seen["mlp_in"] = output[0]

    return hook


def _after_mlp(
    seen: dict[str, Tensor], source: str, target: str, replace: Replace | None
) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        seen["mlp_out"] = output[0]
        for site in seen.keys() - {source, target}:
            del seen[site]
        return None if replace is None else replace(seen[source], output[0]).to(output.dtype).unsqueeze(0)

    return hook
