"""An attribution graph as the JSON that circuit-tracer's viewer and Neuronpedia show.

The fields are circuit-tracer 0.5's (`frontend/graph_models.py`, schema version 1) with the optional ones of
Neuronpedia's `graph-schema.json` 1.0.0; both leave alone what they do not know. Node ids are theirs too:
`<layer>_<feature>_<token>` for features, `0_<layer>_<token>` for errors, `E_<token id>_<token>` for embeddings and
`<layers + 1>_<token id>_<token>` for logits.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from mtc.results import Graph, GraphNode

MEDIA_TYPE = "application/vnd.circuit-graph+json"
SCHEMA_VERSION = 1
"""From this version on, `feature` is the pair of a feature's layer and index as one number."""
_KINDS = {
    "feature": "cross layer transcoder",  # the only name that the viewers have for features, of single layers too
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}


def circuit_graph(
    graph: Graph,
    slug: str,
    scan: str | None = None,
    source_set: str | None = None,
    features_url: str | None = None,
) -> dict[str, Any]:
    """The graph as an object for `json.dumps`.

    `slug` names the graph. `scan` says where the features are shown: Neuronpedia wants its id of the model, the viewer
    of circuit-tracer an export that it can reach, OWNER/NAME of the hub or a local directory; by default the model's
    last name. For Neuronpedia, `source_set` is its set of the transcoders, and `features_url` the address below which
    each feature's JSON lies elsewhere.

    A node's `influence` is the share of all influence that it and stronger ones hold, and logits have none; activations
    are in scaled units. Raises ValueError for a coarse graph: the viewers know no node that stands for several
    features.
    """
    if graph.coarse is not None:
        raise ValueError(f"graph is coarse, with prefix {graph.coarse}: the graph as traced is wanted")
    ids = _ids(graph)
    stronger = _stronger(graph)
    nodes: dict[str, dict[str, Any]] = {}
    for n, node in enumerate(graph.nodes):  # a feature that is source and target is first met as a source
        nodes.setdefault(ids[n], _node(node, graph.layers, ids[n], stronger.get(n)))
    best = next((n for n, node in enumerate(graph.nodes) if node.kind == "logit"), None)
    if best is not None:
        nodes[ids[best]]["is_target_logit"] = True
    links = {(ids[source], ids[target]): weight for source, target, weight in graph.edges}
    details = {"neuronpedia_source_set": source_set, "feature_json_base_url": features_url}
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or graph.base_model.rstrip("/").split("/")[-1].split(":")[-1].lower(),
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": "".join(graph.tokens),
            "node_threshold": graph.node_share,
            "schema_version": SCHEMA_VERSION,
            "feature_details": {name: value for name, value in details.items() if value},
            "info": {"generator": {"name": "mtc", "version": version("mtc")}},
            "generation_settings": {"max_feature_nodes": graph.read, "prefix": graph.prefix},
            "pruning_settings": {"node_threshold": graph.node_share, "edge_threshold": graph.edge_share},
        },
        "qParams": {
            "pinnedIds": [ids[n] for n, node in enumerate(graph.nodes) if node.target and node.kind == "feature"],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(nodes.values()),
        "links": [{"source": s, "target": t, "weight": weight} for (s, t), weight in links.items()],
    }


def feature_number(layer: int, feature: int) -> int:
    """A feature's layer and index as one number: Cantor's pairing."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _ids(graph: Graph) -> list[str]:
    """Of every node. A feature that is a target has one, also where it is a source as well."""
    found = [_id(node, graph.layers) for node in graph.nodes]
    features = {each for each, node in zip(found, graph.nodes, strict=True) if node.kind == "feature"}
    # Theirs has the same id for the error of layer N and for feature N of layer 0; it would join the two.
    taken = (each in features and node.kind == "error" for each, node in zip(found, graph.nodes, strict=True))
    return [f"error_{each}" if clash else each for each, clash in zip(found, taken, strict=True)]


def _id(node: GraphNode, layers: int) -> str:
    if node.kind == "feature":
        return f"{node.layer}_{node.feature}_{node.token}"
    if node.kind == "error":
        return f"0_{node.layer}_{node.token}"
    return f"{'E' if node.kind == 'embedding' else layers + 1}_{node.token_id}_{node.token}"


def _stronger(graph: Graph) -> dict[int, float]:
    """By node, the share of all influence that it and those above it hold; what pruning took counts in the whole, but
    not above a node. Empty if the whole is not known."""
    if not graph.all_influence:
        return {}
    sources = (n for n, node in enumerate(graph.nodes) if not node.target)
    found, held = {}, 0.0
    for n in sorted(sources, key=lambda n: -graph.nodes[n].influence):
        held += graph.nodes[n].influence
        found[n] = min(held / graph.all_influence, 1.0)
    return found


def _node(node: GraphNode, layers: int, id: str, stronger: float | None) -> dict[str, Any]:
    feature, layer, short = -1, str(node.layer), f"{node.layer}_{node.token}-0"
    label: str | None = ""
    if node.kind == "feature" and node.layer is not None and node.feature is not None:
        feature, short = feature_number(node.layer, node.feature), f"{node.layer}_{node.feature}-0"
        label = node.text or ""
    elif node.kind == "embedding":
        feature, layer, short = node.token, "E", f"E_{node.token_id}-{node.token}"
    elif node.kind == "logit":
        feature, layer, short = node.token_id or 0, str(layers + 1), f"L_{node.token_id}-{node.token}"
        label = f'Output "{node.text}" (p={node.probability or 0:.3f})'
    return {
        "node_id": id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.token,
        "feature_type": _KINDS[node.kind],
        "token_prob": node.probability or 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": short,
        "clerp": label,
        "influence": stronger,
        "activation": node.activation,
    }
