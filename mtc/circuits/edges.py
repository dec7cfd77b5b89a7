"""Every edge into features and targets of one window, each the exact effect in the frozen model.

With attention patterns and norm factors held, what a feature reads is a sum over what lies below: token embeddings,
active features, errors and biases. The edge from a source to what reads it is

    features      activation * (W_dec row) . G    G = derivative of the reader's pre-activation (of a logit: of the
    errors        error . G                       logit less the mean logit) by what the MLP of the source's layer
    embeddings    embedding . G                   adds to the source's token; skip connections are part of G

and the edges into a reader, with what biases alone give, add up to its value. Ameisen et al. 2025, "Circuit Tracing";
transcoders' circuits: Dunefsky et al. 2024, arXiv:2406.11944.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtc.circuits.replacement import ReplacementModel, Taken, take_apart
from mtc.language_model import PackedWindows
from mtc.language_model.frozen import Frozen, Pass
from mtc.language_model.mlps import Sources

BATCH = 128
"""Readers of one backward pass."""


class Readers(NamedTuple):
    """Some places that are read, all of one layer: `layer` is that of features, None for logits."""

    layer: int | None
    token: Tensor
    """[n] int64, where is read."""
    vector: Tensor
    """[n, width], the direction that is read there: in the sources of the layer's transcoder, or in what the
    unembedding reads."""


class Traced:
    """A window's pass, frozen, with its MLPs taken apart; hands out rows of edges.

    Columns of a row: the active features by layer, token and index, the errors of every layer and token, the
    embeddings of every token.
    """

    def __init__(self, model: ReplacementModel, window: PackedWindows, prefix: int | None = None):
        self.model = model
        self.frozen: Frozen = model.model.freeze(window)
        self.taken: dict[int, Taken] = take_apart(model, self.frozen, window, prefix)
        real = self.frozen.real
        self.tokens, self.layers = len(real.final), len(real.mlp_out)
        self.errors = tuple(
            self.taken[layer].error if layer in self.taken else written for layer, written in enumerate(real.mlp_out)
        )
        """Of every layer, [tokens, d_model]."""
        self._first: dict[int, int] = {}
        first = 0
        for layer, taken in self.taken.items():
            self._first[layer], first = first, first + len(taken.feature)
        self.num_features = first
        """Active features: the first columns of a row."""
        self.columns = first + (self.layers + 1) * self.tokens
        self._leaves, self._pass = self._with_gradients()

    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Layer, token, index and activation of each active feature, each [num_features]."""
        found = [
            (torch.full_like(taken.token, layer), taken.token, taken.feature, taken.activation)
            for layer, taken in self.taken.items()
        ]
        layer, token, feature, activation = (torch.cat(parts) for parts in zip(*found, strict=True))
        return layer, token, feature, activation

    def readers(self, columns: Tensor) -> Iterator[tuple[Tensor, Readers, Tensor]]:
        """What the features with these columns, [n] int64 ascending, read, by layer and at most BATCH at a time: their
        columns, the readers, and the biases that are added."""
        for layer, taken in self.taken.items():
            first = self._first[layer]
            of_layer = columns[(columns >= first) & (columns < first + len(taken.feature))]
            for own in of_layer.split(BATCH) if len(of_layer) else ():
                yield own, *self.feature_readers(layer, taken.token[own - first], taken.feature[own - first])

    def feature_readers(self, layer: int, token: Tensor, feature: Tensor) -> tuple[Readers, Tensor]:
        """What features of a layer read at these tokens, all [n], active or not, and their biases."""
        taken = self.taken[layer]
        return Readers(layer, token, taken.W_enc[feature] * taken.factor[token]), taken.b_enc[feature]

    def rows(self, readers: Readers) -> Tensor:
        """Edges into these readers, [n, columns]."""
        parts = [self._rows(readers, slice(a, a + BATCH)) for a in range(0, len(readers.token), BATCH)]
        return torch.cat(parts) if parts else self.frozen.real.final.new_zeros(0, self.columns)

    def values(self, readers: Readers, given: Pass | None = None) -> Tensor:
        """[n], what the readers read in a pass, by default the real one, without what is added to it (b_enc)."""
        return (self._read(given or self.frozen.real, readers.layer)[readers.token] * readers.vector).sum(1)

    @torch.no_grad()
    def biases(self) -> Pass:
        """The pass of which nothing but biases is left: of attention, of norms and of decoders."""
        zero = torch.zeros_like(self.frozen.real.embeddings)

        def added(layer: int, sources: Sources) -> Tensor:
            if layer not in self.taken:
                return zero
            taken = self.taken[layer]
            return taken.constant + taken.skipped(self.model.source(layer, sources))

        return self.frozen.run(zero, added)

    def _read(self, given: Pass, layer: int | None) -> Tensor:
        return given.final if layer is None else self.model.source(layer, given.sources[layer])

    def _with_gradients(self) -> tuple[list[Tensor], Pass]:
        """What is written, as leaves: of every layer less its skip connection, then the embeddings; and the pass."""
        real = self.frozen.real
        leaves = []
        for layer, written in enumerate(real.mlp_out):
            taken = self.taken.get(layer)
            own = written if taken is None else written - taken.skipped(self.model.source(layer, real.sources[layer]))
            leaves.append(own.detach().clone().requires_grad_())
        leaves.append(real.embeddings.detach().clone().requires_grad_())

        def added(layer: int, sources: Sources) -> Tensor:
            taken = self.taken.get(layer)
            if taken is None:
                return leaves[layer]
            return leaves[layer] + taken.skipped(self.model.source(layer, sources))

        with torch.enable_grad():
            return leaves, self.frozen.run(leaves[-1], added)

    @torch.no_grad()
    def _rows(self, readers: Readers, part: slice) -> Tensor:
        token, vector = readers.token[part], readers.vector[part]
        read = self._read(self._pass, readers.layer)
        below = self.layers if readers.layer is None else readers.layer
        inputs = [*self._leaves[:below], self._leaves[-1]]
        wanted = torch.zeros(len(token), *read.shape, dtype=read.dtype, device=read.device)
        wanted[torch.arange(len(token), device=token.device), token] = vector
        *gradients, of_embeddings = torch.autograd.grad(
            read, inputs, wanted, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        rows = read.new_zeros(len(token), self.columns)
        of_errors = rows[:, self.num_features :].unflatten(1, (self.layers + 1, self.tokens))
        of_errors[:, -1] = torch.einsum("ntd,td->nt", of_embeddings, self.frozen.real.embeddings)
        for layer, gradient in enumerate(gradients):
            of_errors[:, layer] = torch.einsum("ntd,td->nt", gradient, self.errors[layer])
            if layer in self.taken:
                taken, first = self.taken[layer], self._first[layer]
                for place, own in _by_token(taken.token):
                    directions = taken.directions(taken.feature[own]) * taken.activation[own, None]
                    rows[:, first + own.start : first + own.stop] = gradient[:, place] @ directions.T
        return rows


def logit_readers(model: ReplacementModel, frozen: Frozen, token: int, ids: Sequence[int]) -> Readers:
    """What reads the logits of some ids at a token, each less the mean of all logits.

    A soft cap on logits is held as the ratio of what it gives to what it gets.
    """
    weight, softcap = model.model.read_out()
    weight = weight.detach().to(frozen.real.final.dtype)
    slope = _cap_slope(weight @ frozen.real.final[token], softcap)
    chosen = torch.tensor(list(ids), device=weight.device)
    vector = weight[chosen] * slope[chosen, None] - (slope @ weight / len(weight))
    return Readers(None, torch.full_like(chosen, token), vector)


def _cap_slope(logits: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return torch.ones_like(logits)
    x = logits / softcap
    return torch.where(x == 0, torch.ones_like(x), x.tanh() / x)


def _by_token(token: Tensor) -> list[tuple[int, slice]]:
    """The entries of each token that has any, of a non-descending [entries]."""
    places, counts = torch.unique_consecutive(token, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [(place, slice(end - n, end)) for place, n, end in zip(places.tolist(), counts.tolist(), ends, strict=True)]
