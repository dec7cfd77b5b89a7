"""A graph at a lower resolution: later features folded into the earlier features that they refine.

Sums keep what is linear: edges into a node and its bias still add up to what it reads, the sum of what the nodes read
that it stands for. The page folds in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

from mtc.circuits.replacement import CircuitError
from mtc.results import Graph, GraphNode

_ORDER = {"embedding": 0, "logit": 2}


class Place(NamedTuple):
    """A feature of a layer at a token; with no feature, the layer's others there, which refine none of the prefix."""

    layer: int
    token: int
    feature: int | None


def coarsen(graph: Graph, prefix: int, unfolded: Collection[tuple[int, int, int | None]] = ()) -> Graph:
    """The graph with the features of a prefix alone, each standing for those that refine it at its layer and token.

    `unfolded` are the layer, the token and the feature of nodes whose children are shown beside them, and, with None
    for the feature, of the others that refine none of the prefix. A feature that is not active itself is there if any
    that it stands for is: without an activation. Scores are those of the whole graph.

    Raises CircuitError for a prefix that the graph has no scores of, for a place that has nothing to unfold, and for a
    graph that is coarse already.
    """
    if graph.coarse is not None:
        raise CircuitError(f"graph is coarse, with prefix {graph.coarse}: the graph as traced is wanted")
    known = [score.prefix for score in graph.scores]
    if prefix not in known:
        raise CircuitError(f"prefix={prefix} is not one of the graph's nested dictionaries {known}")
    chains = [_chain(node, graph.prefixes[0]) for node in graph.nodes]
    opened = {Place(*each) for each in unfolded}
    if wrong := opened - {place for chain in chains for place in chain[1:]}:
        raise CircuitError(f"unfolded has {tuple(min(wrong, key=str))}, into which nothing of the graph can be folded")
    # Some layers may have more features than all share: none is folded where all are wanted.
    most = None if prefix == max(known) == max(graph.prefixes) else prefix
    members: dict[Place | int, list[int]] = defaultdict(list)
    """The nodes that are shown as one, by its place, or by their own number where they can't be folded."""
    for n, chain in enumerate(chains):
        members[_shown(chain, most, opened) if chain else n].append(n)
    texts = {(node.layer, node.feature): node.text for node in graph.nodes if node.kind == "feature" and node.text}
    marks = [(own, _joined(graph, place, own, chains, texts)) for place, own in members.items()]
    marks.sort(key=lambda mark: (*_standing(mark[1]), mark[0][0]))
    number = {n: i for i, (own, _) in enumerate(marks) for n in own}
    sums: dict[tuple[int, int], float] = defaultdict(float)
    for source, target, weight in graph.edges:
        sums[number[source], number[target]] += weight
    edges = tuple((source, target, weight) for (source, target), weight in sorted(sums.items()))
    about = {"nodes": tuple(node for _, node in marks), "edges": edges, "coarse": prefix, "faithfulness": None}
    return graph.model_copy(update=about)


def _chain(node: GraphNode, smallest: int) -> list[Place]:
    """Where a feature stands and what it may be folded into, the nearest first; nothing for other nodes."""
    if node.kind != "feature" or node.target:
        return []
    assert node.layer is not None and node.feature is not None
    features: list[int | None] = [node.feature, *node.ancestors]
    last = features[-1]
    if last is not None and last >= smallest:
        features.append(None)
    return [Place(node.layer, node.token, feature) for feature in features]


def _shown(chain: list[Place], prefix: int | None, opened: Collection[Place]) -> Place:
    """What a feature is shown as: itself in the prefix, or where all that it would be folded into is unfolded."""
    shown = chain[-1]
    for inner, outer in zip(chain[-2::-1], chain[:0:-1], strict=True):
        if prefix is not None and inner.feature is not None and inner.feature >= prefix and outer not in opened:
            break
        shown = inner
    return shown


def _joined(
    graph: Graph,
    place: Place | int,
    own: list[int],
    chains: list[list[Place]],
    texts: Mapping[tuple[int | None, int | None], str],
) -> GraphNode:
    """The node that stands for some."""
    nodes = [graph.nodes[n] for n in own]
    if isinstance(place, int):
        return nodes[0]
    itself = next((node for node in nodes if node.feature == place.feature), None)
    chain = chains[own[0]]
    left = chain[chain.index(place) + 1 :]
    return GraphNode(
        kind="others" if place.feature is None else "feature",
        **place._asdict(),
        text=texts.get((place.layer, place.feature)),
        activation=itself.activation if itself else None,
        value=sum(node.value or 0.0 for node in nodes),
        bias=sum(node.bias or 0.0 for node in nodes),
        incoming=sum(node.incoming or 0.0 for node in nodes),
        influence=sum(node.influence for node in nodes),
        group=itself.group if itself else _group(graph, place.feature),
        ancestors=tuple(each.feature for each in left if each.feature is not None),
        folded=len(nodes) - (itself is not None),
    )


def _group(graph: Graph, feature: int | None) -> int | None:
    return None if feature is None else sum(feature >= prefix for prefix in graph.prefixes)


def _standing(node: GraphNode) -> tuple[int, int, int, int]:
    """A graph's order: embeddings, then errors and features by layer and token, then targets."""
    part = 2 if node.target else _ORDER.get(node.kind, 1)
    behind = -1 if node.feature is None or node.kind == "error" else node.feature
    return (part, 0, 0, 0) if part == 2 else (part, node.layer or 0, node.token, behind)
