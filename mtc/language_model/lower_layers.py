"""Layers below the one whose MLP output is replaced: passes over the same windows have them in common, so that one
pass computes them for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class LowerLayers:
    """What passes over the same windows need of the layers below each of `starts`."""

    def __init__(self, starts: Iterable[int]):
        self._starts = set(starts) - {0}
        self._start = 0
        self._record = False
        self._kept: dict[int, Any] = {}
        """What the last layer below a start gave, by start."""

    @contextmanager
    def a_pass(self, start: int | None) -> Iterator[None]:
        """Around a pass: one that replaces nothing (None) is kept from; another starts at layer `start`, if there was
        such a one before."""
        self._record = start is None
        self._start = start if start in self._kept else 0
        try:
            yield
        finally:
            self._record, self._start = False, 0

    @contextmanager
    def installed(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Around all passes, with the model's layers."""
        below = layers[: max(self._starts, default=0)]
        own = [vars(layer).get("forward") for layer in below]
        for number, layer in enumerate(below):
            layer.forward = self._forward(number, layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(below, own, strict=True):
                if forward is None:
                    del layer.forward  # that of its class shows again
                else:
                    layer.forward = forward

    def _forward(self, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            if number < self._start:  # whatever these give, only the last one's output is read further up
                return self._kept[self._start]
            out = own(*args, **named)
            if self._record and number + 1 in self._starts:
                self._kept[number + 1] = out
            return out

        return forward
