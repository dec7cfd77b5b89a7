"""Attribution graphs against sums, frozen passes, matrix inverses, a planted circuit, and transformers itself."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mtc.circuits import CircuitError, FeatureTarget, ReplacementModel, attribute
from mtc.circuits.adjacency import Adjacency, influence, keep_features, prune, scores
from mtc.circuits.attribution import Limits, attribute_whole
from mtc.circuits.edges import Traced
from mtc.circuits.graph import Whole
from mtc.config import ModelConfig
from mtc.language_model import LanguageModel, load_tokenizer, prepare_model
from mtc.transcoder import MatryoshkaTranscoder
from mtc.transcoder.shape import TranscoderShape
from tests.circuits.models import ARCHITECTURES, PROMPT, make_model


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> ReplacementModel:
    return make_model(request.param)


SHAPES = [
    ("llama", {"source": "mlp_in", "input_norm": "scalar"}),
    ("gemma2", {"source": "mlp_in", "input_norm": "none"}),
    ("gpt2", {"skip": False, "activation": "topk"}),
    ("gpt_neox", {"source": "mlp_in", "activation": "jumprelu"}),
]


def columns_of(traced: Traced) -> tuple[Tensor, Tensor, Tensor]:
    layer, token, feature, _ = traced.entries()
    return layer, token, feature


def whole(model: ReplacementModel, **settings: Any) -> Whole:
    return attribute_whole(model, PROMPT, **{"max_features": 10**6} | settings)


@pytest.mark.parametrize(("architecture", "shape"), SHAPES)
def test_edges_and_biases_add_up_with_every_shape_of_transcoder(architecture: str, shape: dict[str, Any]) -> None:
    check_sums(make_model(architecture, **shape))


def test_edges_and_biases_add_up_to_what_is_read(model: ReplacementModel) -> None:
    check_sums(model)


def check_sums(model: ReplacementModel) -> None:
    """Against what transformers itself computes, without a hold on attention and norms."""
    found = whole(model).adjacency
    n = found.num_features
    assert n > 100 and torch.count_nonzero(found.bias) > n / 2
    sums = found.edges.sum(1) + found.bias
    ids = model.window(PROMPT).input_ids
    plain: Any = AutoModelForCausalLM.from_pretrained(prepare_model(model.model.config), dtype=torch.float64).eval()
    with torch.no_grad():
        logits = plain(ids[None]).logits[0, -1]
    ranked = logits.softmax(0).topk(len(found.weights))
    # Norms of transformers compute in float32.
    torch.testing.assert_close(sums[n:], (logits - logits.mean())[ranked.indices], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.weights, ranked.values, rtol=1e-5, atol=1e-7)
    pairs = LanguageModel(several(model)).capture(model.window(PROMPT))
    for layer, pair in zip(sorted(model.transcoders), pairs, strict=True):
        own = found.layer == layer
        z = model.transcoders[layer].encode(pair.source)[found.token[own], found.feature[own]]
        torch.testing.assert_close(sums[:n][own].float(), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums, found.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.activation, found.value[:n], rtol=1e-12, atol=0)
    graph = attribute(model, PROMPT)
    assert graph.identity_error < 1e-12


def several(model: ReplacementModel) -> ModelConfig:
    layers = [{"layer": layer, "source": model.sources[layer]} for layer in sorted(model.transcoders)]
    return ModelConfig.model_validate(model.model.config.model_dump(exclude={"layer"}) | {"layers": layers})


def test_an_edge_is_the_change_in_a_frozen_pass_whose_source_is_changed(model: ReplacementModel) -> None:
    """Without gradients: one column after another, the source alone is made half as large."""
    made = whole(model)
    found, traced = made.adjacency, made.traced
    n, places = found.num_features, found.layers * found.tokens
    real, factor = traced.frozen.real, 0.5
    rng = np.random.default_rng(0)
    columns = [*rng.choice(n, 20, replace=False), *(n + rng.choice(places, 10, replace=False)), n + places + 2]
    for column in columns:
        embeddings, written = real.embeddings.clone(), [each.clone() for each in real.mlp_out]
        if column < n:
            layer, token, feature = (int(part[column]) for part in (found.layer, found.token, found.feature))
            transcoder = model.transcoders[layer]
            own = found.activation[column] * transcoder.W_dec[feature].double() / transcoder.target_scale.double()
            written[layer][token] -= factor * own
        elif column < n + places:
            layer, token = divmod(int(column) - n, found.tokens)
            written[layer][token] -= factor * traced.errors[layer][token]
        else:
            embeddings[int(column) - n - places] *= 1 - factor
        changed = traced.frozen.run(embeddings, with_skips(model, traced, written))
        expected = (read_all(made, real) - read_all(made, changed)) / factor
        torch.testing.assert_close(found.edges[:, column], expected.detach(), rtol=1e-6, atol=1e-9)


def with_skips(model: ReplacementModel, traced: Traced, written: list[Tensor]) -> Any:
    """What MLPs add in a pass in which skip connections follow their sources and all else is as it was written."""

    def added(layer: int, sources: Any) -> Tensor:
        transcoder = model.transcoders.get(layer)
        if transcoder is None or transcoder.W_skip is None:
            return written[layer]
        x = getattr(sources, model.sources[layer]) - getattr(traced.frozen.real.sources[layer], model.sources[layer])
        moved = x * traced.taken[layer].factor @ transcoder.W_skip.double().T / transcoder.target_scale.double()
        return written[layer] + moved * traced.taken[layer].trained

    return added


def read_all(made: Whole, given: Any) -> Tensor:
    """What features and targets read in a pass, less their biases."""
    found, model = made.adjacency, made.model
    parts = []
    for i in range(found.num_features):
        layer, token = int(found.layer[i]), int(found.token[i])
        source = getattr(given.sources[layer], model.sources[layer])[token] * made.traced.taken[layer].factor[token]
        parts.append(source @ model.transcoders[layer].W_enc[found.feature[i]].double())
    weight, softcap = model.model.read_out()
    real = made.traced.frozen.real.final[-1] @ weight.double().T
    logits = given.final[-1] @ weight.double().T
    if softcap is not None:
        logits = logits * (softcap * torch.tanh(real / softcap) / real)
    return torch.stack([*parts, *(logits[list(made.targets)] - logits.mean())])


def test_a_dictionary_that_reconstructs_perfectly_has_no_error_edges() -> None:
    model = make_model("gemma2", group_sizes=(6, 6), skip=False)
    window = model.window("Hello")
    real = model.model.freeze(window).real
    trained = window.trainable
    for layer, transcoder in model.transcoders.items():
        source, target = real.sources[layer].resid_mid[trained], real.mlp_out[layer][trained]
        with torch.no_grad():
            transcoder.b_enc.fill_(20.0)  # all are active
            z = transcoder.normalise(source).double() @ transcoder.W_enc.T.double() + transcoder.b_enc
            wanted = target * transcoder.target_scale - transcoder.b_dec
            transcoder.W_dec.copy_(torch.linalg.lstsq(z, wanted).solution)
    found = attribute_whole(model, "Hello", max_features=10**6).adjacency
    n, tokens = found.num_features, found.tokens
    errors = found.edges[:, n : n + found.layers * tokens].unflatten(1, (found.layers, tokens))
    scale = found.edges.abs().sum(1, keepdim=True)
    assert (errors[:, [0, 2], 1:].abs().sum((1, 2)) < 1e-4 * scale[:, 0]).all()
    assert (errors[n:, 1].abs().sum(1) > 1e-3 * scale[n:, 0]).all()  # that layer has no transcoder
    assert (errors[n:, :, 0].abs().sum(1) > 0).all()  # nor has a special token features


def test_a_planted_circuit_is_found_and_nothing_else(tmp_path: Path) -> None:
    """Two layers: `a` at the first token lights feature 3 of layer 0; uniform attention carries half of what that
    writes to the second token, where it lights feature 5 of layer 1, which raises the logit of `c`."""
    own = ModelConfig(name="random:gpt2", dtype="float32", layer=0)
    tokenizer = load_tokenizer(own)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=2, n_head=1, n_inner=8,
        activation_function="relu", tie_word_embeddings=False,
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(config).eval()
    directions = torch.zeros(6, 16)  # each with mean 0, which a LayerNorm leaves alone
    for i in range(6):
        directions[i, 2 * i : 2 * i + 2] = torch.tensor([1.0, -1.0]) / 2**0.5
    a, b, c = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc")
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            parameter.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        gpt2.transformer.wte.weight[a], gpt2.transformer.wte.weight[b] = 4 * directions[0], 4 * directions[1]
        blocks = gpt2.transformer.h
        blocks[0].mlp.c_fc.weight[:, 3] = directions[0]
        blocks[0].mlp.c_proj.weight[3] = 2 * directions[2]
        # What attention in layer 1 reads and writes: queries and keys are 0, so it looks at all tokens alike.
        blocks[1].attn.c_attn.weight[:, 32:48] = torch.outer(directions[2], directions[2])
        blocks[1].attn.c_proj.weight.copy_(torch.outer(directions[2], directions[3]))
        blocks[1].mlp.c_fc.weight[:, 5] = directions[3]
        blocks[1].mlp.c_proj.weight[5] = 3 * directions[4]
        gpt2.lm_head.weight[c] = directions[4]
    gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    named = ModelConfig(name=str(tmp_path), dtype="float32", layer=0)
    transcoders = {}
    for layer, block in enumerate(blocks):
        shape = TranscoderShape(d_source=16, d_target=16, group_sizes=(4, 4), k=1, input_norm="none")
        transcoders[layer] = MatryoshkaTranscoder(shape)
        with torch.no_grad():  # this MLP is a transcoder
            transcoders[layer].W_enc.copy_(block.mlp.c_fc.weight.T)
            transcoders[layer].W_dec.copy_(block.mlp.c_proj.weight)
            transcoders[layer].threshold.fill_(0.0)
    model = ReplacementModel(
        LanguageModel(named, full=True), transcoders, tokenizer, sources={0: "mlp_in", 1: "mlp_in"}
    )
    graph = attribute(model, [a, b], targets=[c], node_share=1, edge_share=1)
    numbers = {(node.kind, node.layer, node.token, node.feature): i for i, node in enumerate(graph.nodes)}
    first, second = numbers["embedding", None, 0, None], numbers["embedding", None, 1, None]
    low, high = numbers["feature", 0, 0, 3], numbers["feature", 1, 1, 5]
    # At the first token feature 5 of layer 1 is active too, but no target reads it there.
    weights = {(source, target): weight for source, target, weight in graph.edges}
    assert set(weights) == {(first, low), (low, high), (high, len(graph.nodes) - 1)}
    assert {i for edge in weights for i in edge} | {second} == set(range(len(graph.nodes)))
    norm = 4.0 / 16**0.5  # root mean square of 4 * direction, whose 2 entries are 4 / sqrt(2)
    z0 = 4.0 / norm
    carried = 0.5 * 2 * z0 / rms(4 * directions[0] + 2 * z0 * directions[2])
    z1 = carried / rms(4 * directions[1] + carried * directions[3])
    logit = 3 * z1 / rms(4 * directions[1] + carried * directions[3] + 3 * z1 * directions[4])
    expected = {(first, low): z0, (low, high): z1, (high, len(graph.nodes) - 1): logit * (1 - 1 / len(tokenizer))}
    assert weights == pytest.approx({edge: float(value) for edge, value in expected.items()}, rel=1e-4)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def test_features_beyond_the_limit_are_error_and_the_strongest_are_kept() -> None:
    model = make_model("llama")
    full, some = whole(model).adjacency, whole(model, max_features=60).adjacency
    places = list(zip(*(part.tolist() for part in (full.layer, full.token, full.feature)), strict=True))
    chosen = set(zip(*(part.tolist() for part in (some.layer, some.token, some.feature)), strict=True))
    kept = torch.tensor([place in chosen for place in places])
    folded = keep_features(full, kept)
    for ours, theirs in zip(some, folded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(some.edges.sum(1) + some.bias, some.value, rtol=1e-9, atol=1e-12)
    # Chosen in rounds, from what is known so far: not exactly the strongest of the whole graph, but nearly.
    reach = influence(full).nodes[: full.num_features]
    assert reach[kept].sum() > 0.95 * reach.topk(60).values.sum()


def test_a_prefix_of_the_graph_is_the_graph_of_the_prefix() -> None:
    model = make_model("gemma3")
    every = whole(model).adjacency
    cut, own = keep_features(every, every.feature < 16), whole(model, prefix=16).adjacency
    assert 0 < own.num_features < whole(model).adjacency.num_features
    for ours, theirs in zip(cut, own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_influence_and_scores_are_those_of_the_inverse_matrix() -> None:
    found = whole(make_model("gpt_neox")).adjacency
    n, columns, t = found.num_features, found.edges.shape[1], len(found.weights)
    square = torch.zeros(columns + t, columns + t, dtype=torch.float64)
    square[:n, :columns], square[columns:, :columns] = found.edges[:n].abs(), found.edges[n:].abs()
    square = square / square.sum(1, keepdim=True).clamp(min=1e-300)
    start = torch.cat([torch.zeros(columns, dtype=torch.float64), found.weights])
    total = start @ torch.linalg.inv(torch.eye(len(square), dtype=torch.float64) - square) - start
    reach = influence(found)
    torch.testing.assert_close(reach.nodes, total[:columns])
    replacement, completeness = scores(found, reach)
    errors = slice(n, n + found.layers * found.tokens)
    assert replacement == pytest.approx(float(total[errors.stop : columns].sum() / total[n:columns].sum()))
    reads = square.sum(1) > 0  # embeddings and errors do not
    weighed, square = (total + start)[reads], square[reads]
    assert completeness == pytest.approx(float((weighed * (1 - square[:, errors].sum(1))).sum() / weighed.sum()))
    assert 0 < replacement < 1 and 0 < completeness < 1


def test_pruning_keeps_the_shares_and_leaves_no_loose_ends() -> None:
    found = whole(make_model("llama")).adjacency
    reach = influence(found)
    n, errors = found.num_features, found.layers * found.tokens
    sizes = reach.nodes.sort(descending=True).values
    for node_share, edge_share in ((0.8, 0.98), (0.5, 0.5), (1.0, 1.0)):
        kept = prune(found, reach, node_share, edge_share)
        fewest = int((sizes.cumsum(0) < node_share * sizes.sum() - 1e-12).sum()) + 1
        assert (kept.nodes[: n + errors] & (reach.nodes[: n + errors] < sizes[fewest - 1])).sum() == 0
        assert kept.nodes[n + errors :].all()
        used_rows = torch.cat([kept.nodes[:n], torch.ones(len(found.weights), dtype=torch.bool)])
        assert not kept.edges[~used_rows].any() and not kept.edges[:, ~kept.nodes].any()
        assert kept.edges[:, : n + errors].any(0)[kept.nodes[: n + errors]].all()
        assert kept.edges[:n].any(1)[kept.nodes[:n]].all()
        if node_share == 1:  # all that reaches a target
            assert torch.equal(kept.edges, (found.edges != 0) & (reach.readers > 0)[:, None])


def test_a_feature_is_explained_like_a_logit() -> None:
    model = make_model("gemma2")
    found = whole(model).adjacency
    i = int(((found.layer == 2) & (found.token == 5)).nonzero()[0])
    target = FeatureTarget(2, 5, int(found.feature[i]))
    own = whole(model, targets=[target, "x"]).adjacency
    torch.testing.assert_close(own.edges[-2], found.edges[i], rtol=1e-9, atol=1e-12)
    assert own.weights.tolist() == [0.5, 0.5] and float(own.value[-2]) == pytest.approx(float(found.value[i]))
    graph = attribute(model, PROMPT, targets=[target])
    assert graph.nodes[-1].target and graph.nodes[-1].feature == target.feature
    assert all(node.layer != 2 for node in graph.nodes[:-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": 20}, r"prefix=20 is not one of the nested dictionaries \[16, 48\]"),
        ({"max_features": 0}, "max_features=0"),
        ({"node_share": 1.5}, "node_share=1.5"),
        ({"edge_share": 0.0}, "edge_share=0"),
        ({"targets": []}, "targets are 0: 1 to 10"),
        ({"targets": ["Hello"]}, "target 'Hello' is 5 tokens"),
        ({"targets": ["a", "a"]}, "twice"),
        ({"targets": [10**6]}, "target token id 1000000"),
        ({"targets": [FeatureTarget(1, 1, 0)]}, r"target layer 1 has no transcoder; known: \[0, 2\]"),
        ({"targets": [FeatureTarget(2, 99, 0)]}, "target token 99"),
        ({"targets": [FeatureTarget(2, 0, 0)]}, "target token 0 is a special one"),
        ({"targets": [FeatureTarget(2, 1, 48)]}, "target feature 48: 0 to 47"),
    ],
)
def test_bad_arguments_name_the_limit_and_the_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        attribute(make_model("llama"), PROMPT, **settings)


BAD_PROMPTS = [
    ("", "no token but special"),
    ([0, 10**6], "token id 1000000"),
    ([-1], "token id"),
    ("a" * 4000, "prompt has 4001 tokens, the model has"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(CircuitError, match=message):
        attribute(make_model("gpt2"), prompt)


def test_a_graph_that_is_too_large_is_refused_in_time() -> None:
    with pytest.raises(CircuitError, match=r"a max_features of \d+, a shorter prompt or a smaller prefix"):
        attribute(make_model("llama"), PROMPT, limits=Limits(matrix_bytes=10_000))
    known = attribute(make_model("llama"), PROMPT)
    message = f"edges are {len(known.edges):,} after pruning with node_share=0.8 and edge_share=0.98; at most 20"
    with pytest.raises(CircuitError, match=re.escape(message)):
        attribute(make_model("llama"), PROMPT, limits=Limits(edges=20))


def test_keeping_all_features_changes_nothing() -> None:
    found: Adjacency = whole(make_model("gpt2")).adjacency
    for ours, theirs in zip(keep_features(found, torch.ones(found.num_features, dtype=torch.bool)), found, strict=True):
        torch.testing.assert_close(ours, theirs)
