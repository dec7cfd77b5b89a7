"""A prompt's graph before pruning, and after it as a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtc.circuits.adjacency import Adjacency, Influence, Pruned, influence, keep_features, prune, scores
from mtc.circuits.edges import Traced
from mtc.circuits.replacement import CircuitError, ReplacementModel
from mtc.results import Explained, Folded, Graph, GraphNode, PrefixScores


class FeatureTarget(NamedTuple):
    """A feature whose pre-activation at a token is to be explained."""

    layer: int
    token: int
    """Position in the prompt, from 0."""
    feature: int


class Whole(NamedTuple):
    """A prompt's graph before pruning, with what it was made of."""

    model: ReplacementModel
    traced: Traced
    adjacency: Adjacency
    influence: Influence
    token_ids: tuple[int, ...]
    targets: tuple[int | FeatureTarget, ...]
    """Token ids of logits, or features, in the order of the adjacency's last rows."""
    probabilities: Tensor
    """[vocabulary] of the next token."""
    prefix: int


def to_graph(
    whole: Whole,
    node_share: float,
    edge_share: float,
    most_edges: int | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Graph:
    """The whole graph pruned, as a record; `pause` is called between the parts of the work.

    Raises CircuitError if pruning leaves more than `most_edges`.
    """
    model, found = whole.model, whole.adjacency
    kept = prune(found, whole.influence, node_share, edge_share)
    if most_edges is not None and (left := int(torch.count_nonzero(kept.edges))) > most_edges:
        raise CircuitError(
            f"edges are {left:,} after pruning with node_share={node_share:g} and edge_share={edge_share:g}; at most "
            f"{most_edges:,} are wanted: lower shares, or a smaller max_features"
        )
    pause()
    scores = []
    for prefix in model.prefixes:
        if prefix <= whole.prefix:
            scores.append(_scores(whole, prefix))
            pause()
    nodes, numbers = _nodes(whole, kept)
    rows, columns = kept.edges.nonzero(as_tuple=True)
    weights = found.edges[rows, columns].tolist()
    n = found.num_features
    of_row = {row: numbers[row] if row < n else len(nodes) - len(whole.targets) + row - n for row in set(rows.tolist())}
    edges = sorted((numbers[c], of_row[r], w) for r, c, w in zip(rows.tolist(), columns.tolist(), weights, strict=True))
    return Graph(
        run_id=model.run.run_id if model.run else None,
        base_model=model.model.config.name,
        layers=found.layers,
        traced=tuple(sorted(model.transcoders)),
        token_ids=whole.token_ids,
        tokens=tuple(model.strings(whole.token_ids)),
        prefix=whole.prefix,
        prefixes=model.prefixes,
        active=whole.traced.num_features,
        read=n,
        node_share=node_share,
        edge_share=edge_share,
        all_edges=int(torch.count_nonzero(found.edges)),
        all_influence=float(whole.influence.nodes.sum()),
        scores=tuple(scores),
        identity_error=_identity_error(found),
        nodes=tuple(nodes),
        edges=tuple(edges),
    )


def _scores(whole: Whole, prefix: int) -> PrefixScores:
    """Of the prefix's features alone, and with those that are folded into them: a node that stands for several explains
    what they explain."""
    found = whole.adjacency
    places = list(zip(*(each.tolist() for each in (found.layer, found.token, found.feature)), strict=True))
    kept, nodes = [], set()
    for layer, token, feature in places:
        own = next((f for f in (feature, *whole.model.ancestors(layer, feature)) if f < prefix), None)
        kept.append(own is not None)
        if own is not None:
            nodes.add((layer, token, own))
    alone, with_folded = found.feature < prefix, torch.tensor(kept, dtype=torch.bool, device=found.edges.device)
    of_prefix = explained(whole, alone)
    folded = of_prefix if torch.equal(alone, with_folded) else explained(whole, with_folded)
    about = Folded(nodes=len(nodes), **folded.model_dump())
    return PrefixScores(prefix=prefix, folded=about, **of_prefix.model_dump())


def explained(whole: Whole, kept: Tensor) -> Explained:
    """What the graph explains with some of its features, [features] bool."""
    own = keep_features(whole.adjacency, kept)
    reach = influence(own)
    replacement, completeness = scores(own, reach)
    n, at_special = own.num_features, [i in whole.model.special for i in whole.token_ids] * own.layers
    errors = reach.nodes[n : n + len(at_special)][torch.tensor(at_special, device=reach.nodes.device)]
    ends = reach.nodes[n:].sum().clamp(min=torch.finfo(errors.dtype).tiny)
    special = float(errors.sum() / ends)
    return Explained(features=n, replacement=replacement, completeness=completeness, special_errors=special)


def _identity_error(found: Adjacency) -> float:
    sums = found.edges.sum(1) + found.bias
    size = found.edges.abs().sum(1) + found.bias.abs()
    return float(((sums - found.value).abs() / size.clamp(min=1e-30)).max())


def _nodes(whole: Whole, kept: Pruned) -> tuple[list[GraphNode], dict[int, int]]:
    """What is left, in the order of a graph's nodes, and the number of each column there."""
    model, found, reach = whole.model, whole.adjacency, whole.influence.nodes.tolist()
    n, tokens, texts = found.num_features, found.tokens, model.strings(whole.token_ids)
    incoming, value, bias = found.edges.abs().sum(1).tolist(), found.value.tolist(), found.bias.tolist()

    def read(row: int) -> dict[str, Any]:
        return {"value": value[row], "bias": bias[row], "incoming": incoming[row]}

    placed: list[tuple[tuple[int, int, int], int, GraphNode]] = []
    """With where each stands: layer, token, and one behind a feature's index."""
    for column in kept.nodes.nonzero().squeeze(1).tolist():
        layer, token = divmod(column - n, tokens)
        about: dict[str, Any] = {"kind": "error", "layer": layer, "token": token, "influence": reach[column]}
        if column < n:
            layer, token, feature = (int(part[column]) for part in (found.layer, found.token, found.feature))
            about |= {"kind": "feature", "layer": layer, "token": token, "feature": feature}
            about |= read(column) | model.about(layer, feature) | {"activation": float(found.activation[column])}
        elif layer == found.layers:
            about |= {"kind": "embedding", "layer": None, "token_id": whole.token_ids[token], "text": texts[token]}
            layer = -1
        placed.append(((layer, token, about.get("feature", -1) + 1), column, GraphNode(**about)))
    placed.sort(key=lambda each: each[0])
    nodes = [node for _, _, node in placed]
    for i, target in enumerate(whole.targets):
        about = {"influence": float(found.weights[i]), "target": True} | read(n + i)
        if isinstance(target, FeatureTarget):
            about |= {"kind": "feature"} | target._asdict() | model.about(target.layer, target.feature)
        else:
            about |= {"kind": "logit", "token": tokens - 1, "token_id": target, "text": model.texts.token(target)}
            about["probability"] = float(whole.probabilities[target])
        nodes.append(GraphNode(**about))
    return nodes, {column: number for number, (_, column, _) in enumerate(placed)}
