"""Whether a graph foretells what happens: features are taken out of the real model, one at a time.

The real model's attention, norms and MLPs are free to react. The graph foretells the change with all of them held and
with features that react linearly: a feature's whole contribution to the targets, over all paths, is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.stats import spearmanr
from torch import Tensor

from mtc.circuits.adjacency import Adjacency, propagate
from mtc.circuits.graph import FeatureTarget, Whole
from mtc.circuits.replacement import CircuitError
from mtc.language_model.mlps import Sources, Visit
from mtc.results import Faithfulness, Graph

BATCH = 32
"""Features that are taken out in one pass, each in a row of its own."""


def contributions(adjacency: Adjacency) -> Tensor:
    """[columns], what each node adds to the weighed sum of the targets over all paths, with features that react
    linearly to what they read."""
    n = adjacency.num_features
    gains = adjacency.edges[:n] / adjacency.activation[:, None]
    columns = torch.arange(n, device=gains.device)
    return propagate(adjacency.weights.to(gains) @ adjacency.edges[n:], gains, columns, adjacency.layer)


@torch.no_grad()
def measure_faithfulness(
    whole: Whole, graph: Graph, most: int, pause: Callable[[], None] = lambda: None
) -> Faithfulness:
    """Take out the graph's `most` features of most influence, one at a time; `pause` is called between passes. Raises
    CircuitError for a graph whose targets are features: what is compared is the next token's logits."""
    if any(isinstance(target, FeatureTarget) for target in whole.targets):
        raise CircuitError("targets are features: faithfulness is measured on the logits of next tokens")
    found = whole.adjacency
    known = {key: c for c, key in enumerate(zip(*(x.tolist() for x in found[:3]), strict=True))}
    nodes = [i for i, node in enumerate(graph.nodes) if node.kind == "feature" and not node.target]
    nodes = sorted(nodes, key=lambda i: (-graph.nodes[i].influence, i))[:most]
    columns = [known[graph.nodes[i].layer, graph.nodes[i].token, graph.nodes[i].feature] for i in nodes]
    foretold = -contributions(found)[columns] if columns else found.value.new_empty(0)
    clean = _targets(whole, [])
    parts = []
    for a in range(0, len(columns), BATCH):
        pause()
        parts.append(_targets(whole, columns[a : a + BATCH]) - clean)
    real = torch.cat(parts) if parts else foretold
    return compare(real.tolist(), foretold.tolist(), nodes)


def compare(real: list[float], foretold: list[float], nodes: list[int]) -> Faithfulness:
    """How two lists of changes, of the features with these numbers in a graph, go together."""
    varies = len(real) >= 3 and len(set(real)) > 1 and len(set(foretold)) > 1
    return Faithfulness(
        features=len(real),
        spearman=float(spearmanr(real, foretold).statistic) if varies else None,
        same_sign=sum(a * b > 0 for a, b in zip(real, foretold, strict=True)) / len(real) if real else None,
        real=tuple(real),
        foretold=tuple(foretold),
        nodes=tuple(nodes),
    )


def _targets(whole: Whole, columns: list[int]) -> Tensor:
    """[columns], the weighed sum of the targets' logits less their mean with each of these features taken out; [1] with
    none for no columns."""
    found, model = whole.adjacency, whole.model
    visits: dict[int, Visit] = {}
    for layer, taken in whole.traced.taken.items():
        rows = [row for row, column in enumerate(columns) if int(found.layer[column]) == layer]
        if rows:
            own = [columns[row] for row in rows]
            written = taken.directions(found.feature[own]) * found.activation[own, None]
            visits[layer] = _less(rows, found.token[own], written)
    ids = torch.tensor([whole.token_ids] * max(1, len(columns)), device=found.edges.device)
    logits = model.model.continuing(visits).step(ids).to(found.weights.dtype)
    return (logits[:, list(whole.targets)] - logits.mean(1, keepdim=True)) @ found.weights


def _less(rows: list[int], token: Tensor, written: Tensor) -> Visit:
    def visit(sources: Sources, mlp_out: Tensor) -> Tensor:
        changed = mlp_out.clone()
        changed[rows, token] -= written.to(changed.dtype)
        return changed

    return visit
