"""Which of a window's active features a graph holds: the strongest by influence, found while edges are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtc.circuits.adjacency import Adjacency, fold, propagate, shares_of
from mtc.circuits.edges import Readers, Traced
from mtc.circuits.replacement import CircuitError

ROUNDS = 8
"""Times that influence is computed, each from the rows known so far, before the next strongest features are read."""
MOST_BYTES = 4 << 30
"""Largest matrix of edges; twice that is held besides while shares are computed."""

Progress = Callable[[int, int], None]
"""Told how many features were read, of how many: after every few of them, and between the parts of what follows. What
it raises ends the work."""


class Target(NamedTuple):
    """Some readers that a graph explains."""

    readers: Readers
    constant: Tensor
    """[n], what is added to what they read: a feature's bias."""
    weights: Tensor
    """[n], how much each counts."""


def adjacency(
    traced: Traced, targets: Sequence[Target], max_features: int, tell: Progress, most_bytes: int = MOST_BYTES
) -> Adjacency:
    """Edges into targets, and into the `max_features` features of most influence on them; what other features wrote is
    part of the errors.

    Raises CircuitError if the edges take more than `most_bytes`.
    """
    layer, token, feature, activation = traced.entries()
    most, weights = min(max_features, traced.num_features), torch.cat([target.weights for target in targets])
    _check_size(traced, most + len(weights), activation.element_size(), most_bytes)
    found = _Rows(traced, most + len(weights))
    for target in targets:
        found.read(None, target.readers, target.constant)
    chosen = torch.zeros_like(layer, dtype=torch.bool)
    for n in range(ROUNDS if most < traced.num_features else 1):
        wanted = most * (n + 1) // ROUNDS - int(chosen.sum()) if most < traced.num_features else most
        strength = torch.ones_like(activation) if wanted == most else found.influence(weights, layer)
        pending = strength.masked_fill(chosen, -1).topk(wanted).indices.sort().values
        for columns, readers, constant in traced.readers(pending):
            found.read(columns, readers, constant)
            chosen[columns] = True
            tell(int(chosen.sum()), most)
    edges, bias, value = found.in_order()
    return Adjacency(
        layer[chosen], token[chosen], feature[chosen], activation[chosen], traced.layers, traced.tokens,
        fold(edges, chosen, layer * traced.tokens + token), bias, value, weights,
    )  # fmt: skip


class _Rows:
    """Edges as they become known: targets, then features in any order."""

    def __init__(self, traced: Traced, rows: int):
        self._traced, self._biases = traced, traced.biases()
        self._edges = traced.errors[0].new_zeros(rows, traced.columns)
        self._bias, self._value = self._edges.new_zeros(rows), self._edges.new_zeros(rows)
        self._column = torch.full((rows,), traced.columns, device=self._edges.device)
        """The column of each row that is a feature's; of targets one behind the last."""
        self._filled = 0

    def read(self, columns: Tensor | None, readers: Readers, constant: Tensor) -> None:
        own = slice(self._filled, self._filled + len(constant))
        self._edges[own] = self._traced.rows(readers)
        self._bias[own] = self._traced.values(readers, self._biases) + constant
        self._value[own] = self._traced.values(readers) + constant
        if columns is not None:
            self._column[own] = columns
        self._filled = own.stop

    def influence(self, weights: Tensor, layer: Tensor) -> Tensor:
        """[active features], from the rows that are known."""
        shares, t = shares_of(self._edges[: self._filled]), len(weights)
        column = self._column[t : self._filled]
        return propagate(weights.to(shares) @ shares[:t], shares[t:], column, layer[column])[: len(layer)]

    def in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Edges, biases and values: features by column, then targets."""
        order = self._column[: self._filled].sort(stable=True).indices
        return self._edges[order], self._bias[order], self._value[order]


def _check_size(traced: Traced, rows: int, item: int, most_bytes: int) -> None:
    if (size := rows * traced.columns * item) > most_bytes:
        most = most_bytes // (traced.columns * item)
        raise CircuitError(
            f"edges into {rows:,} nodes from {traced.columns:,}, those of a prompt of {traced.tokens} tokens, take "
            f"{size / 1e9:.1f} GB; at most {most_bytes / 1e9:.1f} GB are wanted: a max_features of {most:,}, a shorter "
            "prompt or a smaller prefix"
        )
