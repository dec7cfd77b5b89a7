"""Attribution graphs of random numbers, of the shape of real ones, and what folding makes of them, worked out apart."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from mtc.results import Graph

PREFIXES = (100, 300, 500)
HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<!--<script>", "\u202eevil", "\n", "\u2028", '"onload=alert(1) x="',
    "]]>", "\x00\x1b", "&lt;b&gt;", "\ufffe\ufeff", "',alert(1),'", " a",
]  # fmt: skip


SHORT = {
    "' a' (87 %) in ' of a' (61 %)": "' a' in ' of a'",
    "no single token; near ' war', ' army'": "near ' war', ' army'",
    "'12', '3' (2 of 3); after ' b' (64 %)": "'12', '3'; after ' b'",
    "no single token; most often ' to', '!' (31 %); near ' war'": "' to', '!'; near ' war'",
    "no single token": "no single token",
    "numbers (93 %)": "numbers",
}
"""Labels of features, and what is told of them where there is little room."""


def make_labelled(nodes: int = 60, layers: int = 6) -> Graph:
    """A graph whose features have the labels of SHORT."""
    graph, labels = make_graph(nodes, layers), list(SHORT)
    named = [
        node.model_copy(update={"text": labels[(node.feature or 0) % len(labels)]}) if node.kind == "feature" else node
        for node in graph.nodes
    ]
    return graph.model_copy(update={"nodes": tuple(named)})


def make_graph(
    nodes: int = 60, layers: int = 6, tokens: Sequence[str] = ("<s>", "The", " capital", " is"), seed: int = 0
) -> Graph:
    """Most features are late and at the last tokens; parents are features of earlier groups, some of them not active;
    one feature is a target beside two next tokens."""
    rng = random.Random(seed)
    last = len(tokens) - 1
    found: list[dict[str, Any]] = [
        {"kind": "embedding", "token": t, "token_id": t, "text": text, "influence": rng.random() / 10}
        for t, text in enumerate(tokens)
    ]
    places = set[tuple[int, int, int]]()
    while len(places) < nodes - len(found) - 3:
        token = max(0, last - int(rng.expovariate(0.7)))
        places.add(
            (rng.randrange(layers), token, rng.choice([-1, *(rng.randrange(PREFIXES[g]) for g in (0, 1, 2, 2))]))
        )
    parents = dict[tuple[int, int], int | None]()

    def ancestors(layer: int, feature: int) -> list[int]:
        if (layer, feature) not in parents:
            smaller = max((p for p in PREFIXES if p <= feature), default=0)
            active = sorted({f for at, _, f in places if at == layer and 0 <= f < smaller})
            choices = [None, rng.randrange(smaller), *active[:3]] if smaller else [None]
            parents[layer, feature] = rng.choice(choices)
        parent = parents[layer, feature]
        return [] if parent is None else [parent, *ancestors(layer, parent)]

    for layer, token, feature in sorted(places):
        about: dict[str, Any] = {"layer": layer, "token": token, "influence": rng.random() / 20}
        if feature < 0:
            found.append({"kind": "error", **about})
            continue
        group = next(g for g, prefix in enumerate(PREFIXES) if feature < prefix)
        about |= {
            "feature": feature,
            "group": group,
            "ancestors": ancestors(layer, feature),
            "text": rng.choice([None, *tokens]),
        }
        found.append({"kind": "feature", "activation": rng.random(), "value": rng.random(), "bias": 0.1, **about})
    target: dict[str, Any] = {"kind": "feature", "layer": layers - 1, "token": last, "feature": 3, "group": 0}
    found.append({**target, "target": True, "value": 1.5, "bias": 0.1, "influence": 0.3})
    for i, probability in enumerate((0.5, 0.2)):
        text = f" next{i}"
        about = {"token": last, "token_id": 10 + i, "text": text, "influence": probability, "probability": probability}
        found.append({"kind": "logit", "target": True, "value": 4.0, "bias": 0.5, **about})
    edges = []
    for reader, node in enumerate(found):
        if node["kind"] in ("embedding", "error"):
            continue
        earlier = [i for i, each in enumerate(found) if _row(each, layers) < _row(node, layers)]
        own = [(i, rng.gauss(0, 1)) for i in earlier if rng.random() < 0.3 and not found[i].get("target")]
        node["incoming"] = 1.2 * sum(abs(weight) for _, weight in own) + 0.01
        edges += [(i, reader, weight) for i, weight in own]
    scores = [{"prefix": p, **_explained(p), "folded": {"nodes": p // 20, **_explained(p + 200)}} for p in PREFIXES]
    return Graph.model_validate(
        {
            "run_id": "one/layer<1>", "base_model": "random", "layers": layers, "traced": tuple(range(layers)),
            "token_ids": tuple(range(len(tokens))), "tokens": tuple(tokens), "prefix": PREFIXES[-1],
            "prefixes": PREFIXES, "active": 5 * nodes, "read": 2 * nodes, "node_share": 0.8, "edge_share": 0.98,
            "all_edges": 3 * len(edges), "scores": scores, "identity_error": 0.0, "nodes": found,
            "edges": sorted(edges),
        }
    )  # fmt: skip


def _explained(p: int) -> dict[str, Any]:
    return {
        "features": p // 10, "replacement": 0.1 + p / 1000, "completeness": 0.5 + p / 2000, "special_errors": 0.05,
    }  # fmt: skip


def _row(node: dict[str, Any], layers: int) -> int:
    return -1 if node["kind"] == "embedding" else node.get("layer", layers)


def names_of(
    graph: Graph, prefix: int, opened: Collection[str] = (), groups: Sequence[Sequence[str]] = ()
) -> list[str]:
    """What each node is shown as, by the definition: it climbs to its parent until it is in the prefix or what it
    would be folded into is unfolded and itself seen."""
    refines = {
        (node.layer, child): parent
        for node in graph.nodes if node.feature is not None
        for child, parent in pairwise([node.feature, *node.ancestors])
    }  # fmt: skip

    def lineage(layer: int, token: int, feature: int) -> list[str]:
        parent = refines.get((layer, feature))
        if parent is not None:
            return [f"f.{layer}.{token}.{feature}", *lineage(layer, token, parent)]
        return [f"f.{layer}.{token}.{feature}", *([f"x.{layer}.{token}"] if feature >= graph.prefixes[0] else [])]

    def seen(line: list[str]) -> bool:
        own = line[0]
        if len(line) == 1 or (own.startswith("f") and int(own.split(".")[3]) < prefix):
            return True
        return line[1] in opened and seen(line[1:])

    names = []
    for node in graph.nodes:
        match node.kind:
            case "embedding":
                line = [f"t.{node.token}"]
            case "error":
                line = [f"e.{node.layer}.{node.token}"]
            case "logit":
                line = [f"l.{node.token}.{node.token_id}"]
            case _ if node.target:
                line = [f"g.{node.layer}.{node.token}.{node.feature}"]
            case _:
                assert node.layer is not None and node.feature is not None
                line = lineage(node.layer, node.token, node.feature)
        owner = next((n for name in line for n, group in enumerate(groups) if name in group), None)
        while owner is None and not seen(line):
            line = line[1:]
        names.append(line[0] if owner is None else f"h.{owner}")
    return names


def sums_of(graph: Graph, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Sums of the edges between what nodes are shown as."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for source, target, weight in graph.edges:
        if names[source] != names[target]:
            sums[names[source], names[target]] += weight
    return dict(sums)
