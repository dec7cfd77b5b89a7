"""Graphs at lower resolutions: what features are folded into, the sums of their edges, and what is explained."""

import random
from functools import cache

import numpy as np
import pytest
import torch

from mtc.circuits import CircuitError, coarsen
from mtc.circuits.attribution import attribute_whole
from mtc.circuits.graph import Whole, to_graph
from mtc.export.circuit_graph import circuit_graph
from mtc.results import Graph, GraphNode
from tests.circuits.models import GROUPS, PROMPT, make_model
from tests.graph_example import PREFIXES, make_graph, names_of, sums_of


@cache
def traced() -> tuple[Whole, Graph]:
    """All of a tiny model's graph, and its record. By its tree every third later feature refines none, the others an
    earlier one, of their own group or the first, active or not."""
    model = make_model("gemma2")
    for layer in model.transcoders:
        model._known[layer] = {f: (parent_of(f), None) for f in range(sum(GROUPS))}
    whole = attribute_whole(model, PROMPT)
    return whole, to_graph(whole, 1, 1)


def parent_of(feature: int) -> int | None:
    return None if feature < GROUPS[0] or feature % 3 == 0 else feature - 7


def first_of(feature: int) -> int | None:
    """The feature of the first group that a feature is, or is folded into."""
    parent = parent_of(feature)
    return feature if feature < GROUPS[0] else None if parent is None else first_of(parent)


def name_of(node: GraphNode) -> str:
    match node.kind:
        case "embedding":
            return f"t.{node.token}"
        case "logit":
            return f"l.{node.token}.{node.token_id}"
        case "error" | "others":
            return f"{node.kind[0].replace('o', 'x')}.{node.layer}.{node.token}"
    return f"{'g' if node.target else 'f'}.{node.layer}.{node.token}.{node.feature}"


@pytest.mark.parametrize("seed", range(4))
def test_features_are_folded_into_what_they_refine_and_edges_are_sums(seed: int) -> None:
    graph, rng = make_graph(160, seed=seed), random.Random(seed)
    for prefix in PREFIXES:
        for share in (0.0, 0.3, 1.0):
            folds = sorted({name for each in PREFIXES for name in names_of(graph, each) if name[0] in "fx"})
            outer = {f"f.{n.layer}.{n.token}.{a}" for n in graph.nodes if not n.target for a in n.ancestors}
            opened = [name for name in folds if (name in outer or name[0] == "x") and rng.random() < share]
            places = [
                (int(p[1]), int(p[2]), int(p[3]) if p[0] == "f" else None) for p in map(lambda n: n.split("."), opened)
            ]
            coarse, names = coarsen(graph, prefix, places), names_of(graph, prefix, opened)
            if prefix == PREFIXES[-1]:
                names = [name_of(node) for node in graph.nodes]
            found = {name_of(node): node for node in coarse.nodes}
            assert sorted(found) == sorted(set(names)) and len(found) == len(coarse.nodes)
            edges = {(name_of(coarse.nodes[s]), name_of(coarse.nodes[t])): weight for s, t, weight in coarse.edges}
            assert edges == pytest.approx(sums_of(graph, names))
            for name, node in found.items():
                own = [graph.nodes[n] for n, each in enumerate(names) if each == name]
                assert node.influence == pytest.approx(sum(each.influence for each in own))
                itself = [each for each in own if name_of(each) == name]
                assert node.folded == len(own) - len(itself)
                assert node.activation == (itself[0].activation if itself else None)
            order = [
                (n.target, -1 if n.kind == "embedding" else n.layer or 0) for n in coarse.nodes if n.kind != "logit"
            ]
            assert order == sorted(order)


def test_what_a_node_reads_is_the_sum_of_its_edges_and_its_bias_at_every_resolution() -> None:
    _, graph = traced()
    for prefix in (GROUPS[0], sum(GROUPS)):
        coarse = coarsen(graph, prefix)
        sums = torch.zeros(len(coarse.nodes), dtype=torch.float64)
        for _, target, weight in coarse.edges:
            sums[target] += weight
        for node, read in zip(coarse.nodes, sums.tolist(), strict=True):
            if node.value is not None:
                assert read + (node.bias or 0) == pytest.approx(node.value, abs=1e-9 * (node.incoming or 1))
    folded = coarsen(graph, GROUPS[0])
    kinds = [node.kind for node in folded.nodes]
    assert kinds.count("others") and len(folded.nodes) < len(graph.nodes) and folded.coarse == GROUPS[0]
    assert any(node.folded and node.activation is None for node in folded.nodes if node.kind == "feature")
    assert any(node.folded and node.activation is not None for node in folded.nodes if node.kind == "feature")
    assert coarsen(graph, sum(GROUPS)).nodes == graph.nodes and coarsen(graph, sum(GROUPS)).edges == graph.edges


def test_what_is_explained_is_what_the_folded_nodes_explain() -> None:
    """A node that stands for several reads, as shares, the mean of what they read, each by its influence; what the
    others write is part of the errors where they are."""
    whole, graph = traced()
    nodes, score = graph.nodes, next(each for each in graph.scores if each.prefix == GROUPS[0])
    names = [name.replace("x", "e") for name in names_of(graph, GROUPS[0])]
    others = [name[0] == "e" and node.kind == "feature" for name, node in zip(names, nodes, strict=True)]
    rows = [n for n in range(len(nodes)) if not others[n]]
    edges = np.zeros((len(nodes), len(nodes)))  # from a column to a row
    for source, target, weight in graph.edges:
        into = source if not others[source] else next(n for n in rows if names[n] == names[source])
        edges[target, into] += weight
    edges = abs(edges[np.ix_(rows, rows)])
    shares = edges / edges.sum(1, keepdims=True).clip(1e-300)
    weights = np.array([nodes[n].influence * nodes[n].target for n in rows])
    reach = weights @ np.linalg.inv(np.eye(len(rows)) - shares)

    marks = sorted({names[n] for n in rows})
    member = np.array([[names[n] == mark for n in rows] for mark in marks], float)
    mass = member @ reach
    folded = (member * reach) @ shares @ member.T / mass.clip(1e-300)[:, None]
    reached = (member @ weights) @ np.linalg.inv(np.eye(len(marks)) - folded)
    assert reached == pytest.approx(mass)  # folding leaves influence what it is
    kinds = np.array([mark[0] for mark in marks])
    ends = reached[kinds == "t"].sum(), reached[kinds == "e"].sum()
    assert score.folded.replacement == pytest.approx(ends[0] / sum(ends))
    reads = reached * np.isin(kinds, ["f", "g", "l"])
    assert score.folded.completeness == pytest.approx(1 - reads @ folded[:, kinds == "e"].sum(1) / reads.sum())
    bos = np.array([mark[0] == "e" and mark.endswith(".0") for mark in marks])
    assert 0 < score.folded.special_errors == pytest.approx(reached[bos].sum() / sum(ends))

    found = zip(*(each.tolist() for each in whole.adjacency[:3]), strict=True)  # with what influences nothing
    places = [(layer, token, first_of(feature)) for layer, token, feature in found]
    kept = [place for place in places if place[2] is not None]
    assert score.folded.features == len(kept) < len(places) and score.folded.nodes == len(set(kept)) < len(kept)
    assert score.features < score.folded.features and score.replacement < score.folded.replacement
    last = graph.scores[-1]
    assert (last.features, last.replacement) == (last.folded.features, last.folded.replacement)


@pytest.mark.parametrize(
    ("prefix", "unfolded", "message"),
    [
        (99, [], r"prefix=99 is not one of the graph's nested dictionaries \[16, 48\]"),
        (16, [(0, 1, 47)], r"unfolded has \(0, 1, 47\), into which nothing of the graph can be folded"),
        (16, [(1, 1, None)], r"unfolded has \(1, 1, None\)"),
    ],
)
def test_bad_arguments_name_the_value(prefix: int, unfolded: list[tuple[int, int, int | None]], message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        coarsen(traced()[1], prefix, unfolded)


def test_a_coarse_graph_is_taken_for_no_other() -> None:
    coarse = coarsen(traced()[1], 16)
    with pytest.raises(CircuitError, match="graph is coarse, with prefix 16"):
        coarsen(coarse, 16)
    with pytest.raises(ValueError, match="graph is coarse, with prefix 16"):
        circuit_graph(coarse, "x")
