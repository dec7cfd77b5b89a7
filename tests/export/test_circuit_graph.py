"""Graphs as viewers read them, against circuit-tracer's own models of nodes and Neuronpedia's list of fields."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from circuit_tracer.frontend.graph_models import Model, Node

from mtc.circuits import FeatureTarget, ReplacementModel, attribute
from mtc.circuits.attribution import attribute_whole
from mtc.circuits.graph import to_graph
from mtc.config import ModelConfig
from mtc.export.circuit_graph import circuit_graph, feature_number
from mtc.language_model import LanguageModel, load_tokenizer
from mtc.results import Graph
from mtc.transcoder import MatryoshkaTranscoder
from mtc.transcoder.shape import TranscoderShape

PROMPT = "Hello, you!"
NEURONPEDIA: dict[str, dict[str, type | tuple[type, ...]]] = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "nodes": {
        "node_id": str, "feature": int, "layer": (str, int), "ctx_idx": int, "feature_type": str, "jsNodeId": str,
        "clerp": str,
    },
    "links": {"source": str, "target": str, "weight": float},
}  # fmt: skip
"""What its graph-schema.json 1.0.0 requires."""


@pytest.fixture(scope="module")
def model() -> ReplacementModel:
    """Three layers, of which the first and the last have transcoders whose features are active at every token."""
    config = ModelConfig(name="random:llama", dtype="float32", layer=1)
    language_model = LanguageModel(config, full=True)
    transcoders = {}
    for layer in (0, 2):
        width = language_model.d_model
        shape = TranscoderShape(d_source=width, d_target=width, group_sizes=(4, 4), k=8, input_norm="rms")
        transcoders[layer] = MatryoshkaTranscoder(shape, seed=layer)
        with torch.no_grad():
            transcoders[layer].W_dec.normal_(generator=torch.Generator().manual_seed(layer))
            transcoders[layer].b_enc.fill_(3.0)
            transcoders[layer].threshold.fill_(0.0)
    return ReplacementModel(language_model, transcoders, load_tokenizer(config))


def theirs(graph: Graph) -> list[dict[str, Any]]:
    """The nodes that circuit-tracer would make, less labels and influence."""
    nodes = []
    best = next(node for node in graph.nodes if node.kind == "logit")
    for node in graph.nodes:
        if node.kind == "feature":
            made = Node.feature_node(node.layer, node.token, node.feature, activation=node.activation)
        elif node.kind == "error":
            made = Node.error_node(node.layer, node.token)
        elif node.kind == "embedding":
            made = Node.token_node(node.token, node.token_id)
        else:
            made = Node.logit_node(
                node.token, node.token_id, node.text, graph.layers, node is best, node.probability or 0.0
            )
        nodes.append(made.model_dump(exclude={"influence"}))
    return nodes


def test_nodes_are_circuit_tracers(model: ReplacementModel) -> None:
    graph = attribute(model, PROMPT, node_share=1, edge_share=1)
    found = circuit_graph(graph, "mine", "OWNER/NAME", source_set="set", features_url="https://x.org/features")
    assert Model.model_validate(found).model_dump()["nodes"] == found["nodes"]
    clashing = 0
    for ours, expected in zip(found["nodes"], theirs(graph), strict=True):
        assert 0 < (ours.pop("influence") or 1) <= 1
        if ours["node_id"] != expected["node_id"]:
            assert ours.pop("node_id") == f"error_{expected.pop('node_id')}"
            clashing += 1
        assert ours == expected
    features = {node["node_id"] for node in found["nodes"] if node["feature_type"] == "cross layer transcoder"}
    assert clashing == len(features & {f"0_{n.layer}_{n.token}" for n in graph.nodes if n.kind == "error"}) > 10
    for part, fields in NEURONPEDIA.items():
        for each in found[part] if isinstance(found[part], list) else [found[part]]:
            assert all(isinstance(each.get(name, "E_"), kind) for name, kind in fields.items())
    assert found["metadata"]["feature_details"] == {
        "neuronpedia_source_set": "set", "feature_json_base_url": "https://x.org/features",
    }  # fmt: skip
    assert feature_number(2, 7) == Node.feature_node(2, 0, 7).feature


def test_links_join_the_nodes_of_the_graphs_edges(model: ReplacementModel) -> None:
    graph = attribute(model, PROMPT)
    found = circuit_graph(graph, "mine")
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    links = [(ids.index(link["source"]), ids.index(link["target"]), link["weight"]) for link in found["links"]]
    assert links == list(graph.edges)
    assert found["metadata"]["scan"] == "llama" and found["metadata"]["prompt_tokens"] == list(graph.tokens)


def test_influence_is_what_a_node_and_stronger_ones_hold_of_the_whole_graph(model: ReplacementModel) -> None:
    whole = attribute_whole(model, PROMPT)
    graph = to_graph(whole, 0.8, 0.98)
    found = circuit_graph(graph, "mine")
    of_all = whole.influence.nodes.sort(descending=True).values.double()
    held = of_all.cumsum(0) / of_all.sum()
    for node, ours in zip(graph.nodes, found["nodes"], strict=True):
        if node.kind in ("feature", "error"):
            place = int((of_all - node.influence).abs().argmin())
            # What pruning left without an edge does not count above a node, and is little.
            assert ours["influence"] == pytest.approx(float(held[place]), abs=0.01)
    assert [node["influence"] for node in found["nodes"] if node["feature_type"] == "logit"] == [None] * 10
    unknown = circuit_graph(graph.model_copy(update={"all_influence": None}), "mine")
    assert {node["influence"] for node in unknown["nodes"]} == {None}


def test_a_feature_that_is_target_and_source_is_one_node(model: ReplacementModel) -> None:
    target = FeatureTarget(0, 2, 3)
    graph = attribute(model, PROMPT, targets=[target, FeatureTarget(2, 4, 1)], node_share=1, edge_share=1)
    found = circuit_graph(graph, "mine")
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes) - 1
    assert found["qParams"]["pinnedIds"] == ["0_3_2", "2_1_4"]
    (both,) = (node for node in found["nodes"] if node["node_id"] == "0_3_2")
    assert both["activation"] is not None and both["influence"] is not None
    assert {"0_3_2"} == {link["source"] for link in found["links"]} & {"0_3_2"}


def test_the_service_can_write_one_without_torch() -> None:
    code = "import sys, mtc.export.circuit_graph; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
