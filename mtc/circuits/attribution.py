"""The attribution graph of a prompt (Ameisen et al. 2025, "Circuit Tracing")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtc.circuits.adjacency import influence
from mtc.circuits.edges import Readers, Traced, logit_readers
from mtc.circuits.faithfulness import measure_faithfulness
from mtc.circuits.graph import FeatureTarget, Whole, to_graph
from mtc.circuits.replacement import CircuitError, Prompt, ReplacementModel
from mtc.circuits.selection import MOST_BYTES, Progress, Target, adjacency
from mtc.language_model import PackedWindows
from mtc.results import Graph
from mtc.storage import RunDirectory
from mtc.text import encode_text

MOST_TARGETS = 10
TARGET_PROBABILITY = 0.95
"""Of the most probable next tokens, as many as hold this are explained, at most MOST_TARGETS."""
MAX_FEATURES = 4096


class Limits(NamedTuple):
    """What a graph may take."""

    matrix_bytes: int = MOST_BYTES
    """Largest matrix of edges before pruning; about three times that is held."""
    edges: int | None = None
    """Most edges after pruning."""


NO_LIMITS = Limits()
"""But that of matrices."""


def attribute(
    run: str | RunDirectory | ReplacementModel,
    prompt: Prompt,
    targets: Sequence[str | int | FeatureTarget] | None = None,
    prefix: int | None = None,
    max_features: int = MAX_FEATURES,
    node_share: float = 0.8,
    edge_share: float = 0.98,
    faithfulness: int = 0,
    tell: Progress = lambda done, of: None,
    limits: Limits = NO_LIMITS,
) -> Graph:
    """The graph of what made the prompt's next token, pruned.

    `run` is a finished run of one layer or several, best of all, or what `ReplacementModel.load` made of one.
    `targets` are next tokens, as text or ids, which count alike, or features; by default the most probable tokens,
    which count by their probabilities. `prefix` uses only that nested dictionary of each layer. `max_features` is how
    many features get edges of their own, the strongest by influence. Pruning keeps the nodes that hold `node_share` of
    the influence and, among these, the edges that hold `edge_share`. `faithfulness` is how many features are taken out
    of the real model, one at a time, to see whether the graph foretells what happens. `tell(done, of)` hears of
    progress, and may end the work. `limits` are on what is held.

    Raises CircuitError that names the argument, the limit and the value, what `ReplacementModel.load` raises, and
    RunError for a run with an analysis of another version.
    """
    model = run if isinstance(run, ReplacementModel) else ReplacementModel.load(run)
    _check_share("node_share", node_share)
    _check_share("edge_share", edge_share)
    if faithfulness < 0:
        raise CircuitError(f"faithfulness={faithfulness}: a number of features is wanted, 0 for none")
    model.read_features()
    whole = attribute_whole(model, prompt, targets, prefix, max_features, tell, limits.matrix_bytes)

    def pause() -> None:
        tell(whole.adjacency.num_features, whole.adjacency.num_features)

    graph = to_graph(whole, node_share, edge_share, limits.edges, pause)
    if not faithfulness:
        return graph
    return graph.model_copy(update={"faithfulness": measure_faithfulness(whole, graph, faithfulness, pause)})


def attribute_whole(
    model: ReplacementModel,
    prompt: Prompt,
    targets: Sequence[str | int | FeatureTarget] | None = None,
    prefix: int | None = None,
    max_features: int = MAX_FEATURES,
    tell: Progress = lambda done, of: None,
    matrix_bytes: int = MOST_BYTES,
) -> Whole:
    """As `attribute`, before pruning."""
    window, wanted = check_question(model, prompt, targets, prefix, max_features)
    traced = Traced(model, window, prefix)
    last = traced.tokens - 1
    logits = model.model.read_out().logits(traced.frozen.real.final[last])
    probabilities = logits.softmax(0)
    if wanted is None:
        wanted = _most_probable(probabilities)
        weights = probabilities[list(wanted)]
    else:
        weights = probabilities.new_full((len(wanted),), 1 / len(wanted))
    readers = [_target(traced, last, each, weight) for each, weight in zip(wanted, weights.split(1), strict=True)]
    found = adjacency(traced, readers, max_features, tell, matrix_bytes)
    tell(found.num_features, found.num_features)
    ids = tuple(window.input_ids.tolist())
    size = prefix or max(model.prefixes)
    return Whole(model, traced, found, influence(found), ids, tuple(wanted), probabilities, size)


def check_question(
    model: ReplacementModel,
    prompt: Prompt,
    targets: Sequence[str | int | FeatureTarget] | None = None,
    prefix: int | None = None,
    max_features: int = MAX_FEATURES,
) -> tuple[PackedWindows, tuple[int | FeatureTarget, ...] | None]:
    """The prompt as a window and the targets, by id, None if they are the most probable tokens; nothing is computed.

    Raises CircuitError, as `attribute` does for these arguments."""
    model.check_prefix(prefix)
    if max_features < 1:
        raise CircuitError(f"max_features={max_features}: at least 1 is wanted")
    window = model.window(prompt)
    return window, _named(model, targets, window.trainable.tolist(), prefix)


def _most_probable(probabilities: Tensor) -> tuple[int, ...]:
    top = probabilities.topk(min(MOST_TARGETS, len(probabilities)))
    enough = int(torch.searchsorted(top.values.cumsum(0), TARGET_PROBABILITY)) + 1
    return tuple(top.indices[:enough].tolist())


def _target(traced: Traced, last: int, target: int | FeatureTarget, weight: Tensor) -> Target:
    if isinstance(target, FeatureTarget):
        at = (torch.tensor([n], device=weight.device) for n in (target.token, target.feature))
        return Target(*traced.feature_readers(target.layer, *at), weight)
    readers: Readers = logit_readers(traced.model, traced.frozen, last, [target])
    return Target(readers, torch.zeros_like(weight), weight)


def _named(
    model: ReplacementModel,
    targets: Sequence[str | int | FeatureTarget] | None,
    trained: list[bool],
    prefix: int | None,
) -> tuple[int | FeatureTarget, ...] | None:
    """The caller's targets, checked; None if there are none."""
    if targets is None:
        return None
    if not 0 < len(targets) <= MOST_TARGETS:
        raise CircuitError(f"targets are {len(targets)}: 1 to {MOST_TARGETS} are wanted")
    found = tuple(_one_named(model, each, trained, prefix) for each in targets)
    if len(set(found)) < len(found):
        raise CircuitError(f"targets name one thing twice: {', '.join(map(repr, targets))}")
    return found


def _one_named(
    model: ReplacementModel, target: str | int | FeatureTarget, trained: list[bool], prefix: int | None
) -> int | FeatureTarget:
    if isinstance(target, FeatureTarget):
        total = prefix or max(model.prefixes)
        if target.layer not in model.transcoders:
            raise CircuitError(f"target layer {target.layer} has no transcoder; known: {sorted(model.transcoders)}")
        if not 0 <= target.token < len(trained):
            raise CircuitError(f"target token {target.token}: the prompt has tokens 0 to {len(trained) - 1}")
        if not trained[target.token]:
            raise CircuitError(f"target token {target.token} is a special one, at which no feature is defined")
        if not 0 <= target.feature < total:
            raise CircuitError(f"target feature {target.feature}: 0 to {total - 1} are wanted")
        return target
    if isinstance(target, int):
        if not 0 <= target < model.model.vocab_size:
            raise CircuitError(f"target token id {target}: 0 to {model.model.vocab_size - 1} are wanted")
        return target
    ids = encode_text(target, model.tokenizer).ids.tolist()
    if len(ids) != 1:
        parts = ", ".join(repr(model.texts.token(i)) for i in ids)
        raise CircuitError(f"target {target!r} is {len(ids)} tokens ({parts}): one is wanted, with its space in front")
    return int(ids[0])


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise CircuitError(f"{name}={value}: above 0 and at most 1 is wanted")
