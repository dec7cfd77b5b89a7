"""A forward pass of one window whose attention patterns and norm factors are held at the values that they had.

What is left of the model between its MLPs is then linear: the residual stream at any place is a sum of what the
embeddings and the MLPs below wrote, each through a fixed matrix. Attribution graphs are read off this (Ameisen et al.
2025, "Circuit Tracing", https://transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtc.language_model.attention import Patterns
from mtc.language_model.mlps import Mlps, Sources

Added = Callable[[int, Sources], Tensor]
"""From a layer's number and its sources, each [tokens, d_model], what its MLP adds to the residual stream, [tokens,
d_model]."""


class Pass(NamedTuple):
    """What a pass gives, in the model's dtype."""

    embeddings: Tensor
    """[tokens, d_model], what enters the first layer: token embeddings, with learnt positions where there are any."""
    sources: tuple[Sources, ...]
    """Of every layer, each [tokens, d_model]."""
    mlp_out: tuple[Tensor, ...]
    """Of every layer, [tokens, d_model]."""
    final: Tensor
    """[tokens, d_model], what the unembedding reads."""


class ReadOut(NamedTuple):
    """From what the unembedding reads to logits: final @ weight.T, then softcap * tanh(. / softcap) if there is one."""

    weight: Tensor
    """[vocabulary, d_model]"""
    softcap: float | None

    def logits(self, final: Tensor) -> Tensor:
        """[..., vocabulary], from [..., d_model], in the dtype of `final`."""
        logits = final @ self.weight.detach().to(final.dtype).T
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Frozen:
    """One window's pass, kept by `LanguageModel.freeze`, and passes with other embeddings and MLPs but its attention
    patterns and norm factors."""

    def __init__(self, base: nn.Module, first: nn.Module, mlps: Mlps, stored_gain: float, run: Callable[..., Any]):
        """`first` is the first layer, `stored_gain` what is added to the stored gain of an RMS norm, `run(patterns)`
        runs the base model on the window and returns what it returns."""
        self._first, self._mlps, self._stored_gain, self._call = first, mlps, stored_gain, run
        self._norms = [module for module in base.modules() if type(module).__name__.endswith("Norm")]
        self._factors: dict[nn.Module, Tensor] = {}
        self._patterns = Patterns()
        with torch.no_grad():
            self.real = self._run(None, None)
            """The pass of the model as it is."""

    def run(self, embeddings: Tensor, added: Added) -> Pass:
        """A pass that starts from these embeddings [tokens, d_model], with `added` in the place of every MLP; linear in
        both, and gradients reach both."""
        return self._run(embeddings, added)

    def _run(self, embeddings: Tensor | None, added: Added | None) -> Pass:
        entered: list[Tensor] = []
        read: list[Sources] = []
        written: list[Tensor] = []

        def enter(module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
            if embeddings is not None:
                args, named = _with_hidden(args, named, embeddings.unsqueeze(0))
            entered.append(_hidden(args, named)[0])
            return args, named

        def visit(sources: Sources, mlp_out: Tensor) -> Tensor | None:
            read.append(Sources(*(part[0] for part in sources)))
            written.append(mlp_out[0] if added is None else added(len(written), read[-1]))
            return None if added is None else written[-1].unsqueeze(0)

        with self._mlps.visited(dict.fromkeys(range(len(self._mlps)), visit)), self._linear_norms():
            hook = self._first.register_forward_pre_hook(enter, with_kwargs=True)
            try:
                final = self._call(self._patterns).last_hidden_state[0]
            finally:
                hook.remove()
        return Pass(entered[0], tuple(read), tuple(written), final)

    @contextmanager
    def _linear_norms(self) -> Iterator[None]:
        """Inside, each norm scales by the factors that it had in the first pass."""
        own = [vars(norm).get("forward") for norm in self._norms]
        for norm in self._norms:
            norm.forward = self._linear(norm)
        try:
            yield
        finally:
            for norm, forward in zip(self._norms, own, strict=True):
                if forward is None:
                    del norm.forward
                else:
                    norm.forward = forward

    def _linear(self, norm: nn.Module) -> Callable[[Tensor], Tensor]:
        centred = isinstance(norm, nn.LayerNorm)
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon")  # noqa: B009
        gain: Any = norm.weight if centred else norm.weight + self._stored_gain  # type: ignore[operator]
        bias: Any = getattr(norm, "bias", None)

        def forward(x: Tensor) -> Tensor:
            if centred:
                x = x - x.mean(-1, keepdim=True)
            if norm not in self._factors:
                self._factors[norm] = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            out = x * self._factors[norm] * gain
            return out if bias is None else out + bias

        return forward


def _hidden(args: Any, named: dict[str, Any]) -> Tensor:
    """What a layer reads, however its model passes it."""
    hidden: Tensor = args[0] if args else named["hidden_states"]
    return hidden


def _with_hidden(args: Any, named: dict[str, Any], hidden: Tensor) -> tuple[Any, dict[str, Any]]:
    return ((hidden, *args[1:]), named) if args else (args, named | {"hidden_states": hidden})
