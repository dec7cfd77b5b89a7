"""The edges of a window's graph as a matrix, how much each node influences the targets, and which are worth showing.

Influence, pruning and the two scores are those of Ameisen et al. 2025, "Circuit Tracing" (Appendix "Graph pruning"):
edges into a node are taken as shares of their absolute sum, and a node's influence is the sum over all paths to the
targets of the product of their shares, each target weighing its probability.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Adjacency(NamedTuple):
    """Edges into the chosen features and the targets; features are in ascending order of layer, token and index."""

    layer: Tensor
    """[features] int64"""
    token: Tensor
    """[features] int64"""
    feature: Tensor
    """[features] int64"""
    activation: Tensor
    """[features]"""
    layers: int
    """Layers of the language model."""
    tokens: int
    """Tokens of the window."""
    edges: Tensor
    """[features + targets, features + (layers + 1) * tokens]: row is what reads, column what is read: features, then
    the errors of each layer's tokens, then the tokens' embeddings."""
    bias: Tensor
    """[features + targets], the part of what is read that is no source's."""
    value: Tensor
    """[features + targets], pre-activations, and logits less the mean logit: the sum of a row's edges and its bias."""
    weights: Tensor
    """[targets], above 0: how much each counts."""

    @property
    def num_features(self) -> int:
        return len(self.feature)


class Influence(NamedTuple):
    """How much of the targets each node explains."""

    nodes: Tensor
    """[columns of the edges], sum over all paths to the targets; at most the sum of the targets' weights."""
    readers: Tensor
    """[rows of the edges], the same of features, and the weights of targets."""
    shares: Tensor
    """[rows, columns], each edge's part of the absolute sum of its row."""


class Scores(NamedTuple):
    """What a graph leaves unexplained; both from 0 to 1."""

    replacement: float
    """Share of the targets' influence that ends in embeddings and not in errors."""
    completeness: float
    """Share of all nodes' incoming edges, each node weighing its influence, that does not come from errors."""


class Pruned(NamedTuple):
    """What is left of a graph."""

    nodes: Tensor
    """[columns] bool"""
    edges: Tensor
    """[rows, columns] bool"""


def keep_features(adjacency: Adjacency, kept: Tensor) -> Adjacency:
    """The graph with some of its features, [features] bool: edges between these stay what they are, and what the others
    wrote is part of their tokens' errors. With the features of a prefix it is the graph of that nested dictionary."""
    places = adjacency.layer * adjacency.tokens + adjacency.token
    rows = torch.cat([kept, kept.new_ones(len(adjacency.weights))])
    return adjacency._replace(
        layer=adjacency.layer[kept], token=adjacency.token[kept], feature=adjacency.feature[kept],
        activation=adjacency.activation[kept], edges=fold(adjacency.edges[rows], kept, places),
        bias=adjacency.bias[rows], value=adjacency.value[rows],
    )  # fmt: skip


def fold(edges: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """Columns of the features that are not `kept`, [features] bool, added to those of the errors at their `places`,
    [features]: layer * tokens + token."""
    n = len(kept)
    rest = edges[:, n:].clone()
    rest.index_add_(1, places[~kept], edges[:, :n][:, ~kept])
    return torch.cat([edges[:, :n][:, kept], rest], 1)


def influence(adjacency: Adjacency) -> Influence:
    """Influence of every node."""
    n, shares = adjacency.num_features, shares_of(adjacency.edges)
    columns = torch.arange(n, device=shares.device)
    nodes = propagate(adjacency.weights.to(shares) @ shares[n:], shares[:n], columns, adjacency.layer)
    return Influence(nodes, torch.cat([nodes[:n], adjacency.weights.to(shares)]), shares)


def propagate(nodes: Tensor, shares: Tensor, column: Tensor, layer: Tensor) -> Tensor:
    """What nodes [columns] get from the targets, and through features: `shares` [features, columns] are those of
    features with these columns and layers, each [features].

    Only features of higher layers read one of a layer, so that a single pass from the last to the first is enough.
    """
    for each in layer.unique().flip(0):
        own = (layer == each).nonzero().squeeze(1)
        nodes = nodes + nodes[column[own]] @ shares[own]
    return nodes


def shares_of(edges: Tensor) -> Tensor:
    """Absolute edges as parts of their rows' sums; a row of zeros stays one."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp(min=torch.finfo(edges.dtype).tiny)


def scores(adjacency: Adjacency, found: Influence) -> Scores:
    """Replacement and completeness score."""
    n, errors = adjacency.num_features, adjacency.layers * adjacency.tokens
    of_errors, of_embeddings = found.nodes[n : n + errors].sum(), found.nodes[n + errors :].sum()
    not_error = 1 - found.shares[:, n : n + errors].sum(1)
    total = (of_errors + of_embeddings).clamp(min=torch.finfo(of_errors.dtype).tiny)
    return Scores(
        float(of_embeddings / total), float((not_error * found.readers).sum() / found.readers.sum().clamp(min=1e-30))
    )


def prune(adjacency: Adjacency, found: Influence, node_share: float, edge_share: float) -> Pruned:
    """Nodes that hold `node_share` of the influence, and of the edges among them those that hold `edge_share`; then
    nodes that nothing reads or, of features, that read nothing are left out. Embeddings and targets stay."""
    n, errors = adjacency.num_features, adjacency.layers * adjacency.tokens
    nodes = found.nodes >= threshold(found.nodes, node_share)
    nodes[n + errors :] = True
    fixed = torch.ones(len(adjacency.weights), dtype=torch.bool, device=nodes.device)
    rows = torch.cat([nodes[:n], fixed])
    left = adjacency._replace(edges=adjacency.edges * rows[:, None] * nodes)
    among = influence(left)
    sizes = among.shares * among.readers[:, None]
    edges = (sizes >= threshold(sizes.flatten(), edge_share)) & (sizes > 0)
    while True:
        nodes[: n + errors] &= edges[:, : n + errors].any(0)
        nodes[:n] &= edges[:n].any(1)
        kept = edges & nodes & torch.cat([nodes[:n], fixed])[:, None]
        if torch.equal(kept, edges):
            return Pruned(nodes, edges)
        edges = kept


def threshold(sizes: Tensor, share: float) -> Tensor:
    """The smallest of the largest sizes that together hold a share of their sum."""
    descending = sizes.sort(descending=True).values
    held = descending.double().cumsum(0) / descending.double().sum().clamp(min=1e-300)
    return descending[min(int(torch.searchsorted(held, share)), len(held) - 1)]
