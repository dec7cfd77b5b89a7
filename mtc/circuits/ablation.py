"""Ablation: what a text's predictions lose if features are taken out of the real model.

At every token, a_j W_dec[j] of each feature j is subtracted from what its layer's MLP adds to the residual stream, in
the model's own units. All else stays: the transcoder's error, the other features as they were, and everything above
reacts as it will. It is what `steer` does with `Intervention(mode="scale", value=0)`, over a text that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtc.circuits.replacement import CircuitError, Prompt, ReplacementModel
from mtc.language_model.mlps import Sources, Visit
from mtc.results import Ablated, NextToken
from mtc.storage import RunDirectory

MOST_ABLATED = 64
SHOWN_CHANGED = 8
"""Next tokens that are named of those that become more probable, and of those that become less."""
ROWS = 16
"""Tokens whose probabilities are compared at once, in float64: a vocabulary may have 262,144 for each."""


@torch.no_grad()
def ablate(run: str | RunDirectory | ReplacementModel, prompt: Prompt, layer: int, features: Sequence[int]) -> Ablated:
    """Take features of one layer out of a text, at all of its tokens but special ones.

    `run` and `prompt` are as for `steer`. Raises CircuitError that names the argument, the limit and the value, and
    what `ReplacementModel.load` raises.
    """
    model = run if isinstance(run, ReplacementModel) else ReplacementModel.load(run)
    chosen = _check(model, layer, features)
    window = model.window(prompt)
    device = model.model.device
    ids, trained = window.input_ids.to(device)[None].long(), window.trainable.to(device)
    before, activations = _observed(model, ids, trained, layer, chosen)
    (fires,) = activations.any(1).nonzero(as_tuple=True)
    if not len(fires):
        return _result(model, ids[0], layer, chosen, activations, None, before, before)
    rows = model.transcoders[layer].W_dec[chosen] / model.transcoders[layer].target_scale
    visits = {layer: _less(activations @ rows)}
    after = model.model.continuing(visits).logits(ids)[0]
    return _result(model, ids[0], layer, chosen, activations, int(fires[0]), before, after)


def _check(model: ReplacementModel, layer: int, features: Sequence[int]) -> list[int]:
    if layer not in model.transcoders:
        raise CircuitError(f"layer={layer} has no transcoder; known: {sorted(model.transcoders)}")
    chosen = sorted(set(features))
    if not 0 < len(chosen) <= MOST_ABLATED:
        raise CircuitError(f"features are {len(chosen)}: 1 to {MOST_ABLATED} are wanted")
    total = model.transcoders[layer].num_features
    if wrong := [feature for feature in chosen if not 0 <= feature < total]:
        raise CircuitError(f"features has {wrong[0]}: 0 to {total - 1} are wanted")
    return chosen


def _observed(
    model: ReplacementModel, ids: Tensor, trained: Tensor, layer: int, chosen: list[int]
) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] of the model as it is, and the features' activations [tokens, chosen]."""
    seen: list[Tensor] = []

    def look(sources: Sources, mlp_out: Tensor) -> None:
        activations = model.transcoders[layer].encode_some(model.source(layer, sources)[0], chosen)
        seen.append(activations * trained[:, None])

    logits = model.model.continuing({layer: look}).logits(ids)[0]
    return logits, seen[0]


def _less(written: Tensor) -> Visit:
    def visit(sources: Sources, mlp_out: Tensor) -> Tensor:
        return mlp_out - written.to(mlp_out.dtype)

    return visit


def _result(
    model: ReplacementModel, ids: Tensor, layer: int, chosen: list[int], activations: Tensor, first: int | None,
    before: Tensor, after: Tensor,
) -> Ablated:  # fmt: skip
    kl, old, new = [], [], []
    for start in range(0, len(ids), ROWS):
        p, q = (logits[start : start + ROWS].double().log_softmax(1) for logits in (before, after))
        kl += (p.exp() * (p - q)).sum(1).clamp(min=0).tolist()
        follows = ids[start + 1 : start + 1 + ROWS, None]
        old += (-p[: len(follows)].gather(1, follows))[:, 0].tolist()
        new += (-q[: len(follows)].gather(1, follows))[:, 0].tolist()
    kl = [0.0] * len(kl) if first is None else [0.0] * first + kl[first:]
    position = None if first is None else max(range(len(kl)), key=kl.__getitem__)
    up, down = _changed(model, before[position], after[position]) if position is not None else ((), ())
    token_ids = ids.tolist()
    return Ablated(
        run_id=model.run.run_id if model.run else None, base_model=model.model.config.name,
        token_ids=tuple(token_ids), tokens=tuple(model.strings(token_ids)), layer=layer, features=tuple(chosen),
        activations=tuple(map(tuple, activations.T.tolist())), first=first, kl=tuple(kl),
        loss_before=tuple(old), loss_after=tuple(new), position=position, up=up, down=down,
    )  # fmt: skip


def _changed(model: ReplacementModel, before: Tensor, after: Tensor) -> tuple[tuple[NextToken, ...], ...]:
    """The next tokens whose probabilities rise most, and those whose fall most."""
    p, q = before.double().log_softmax(0), after.double().log_softmax(0)
    change = q.exp() - p.exp()
    found = []
    for sign in (1, -1):
        most = (sign * change).topk(min(SHOWN_CHANGED, len(change)))
        found.append(
            tuple(
                NextToken(token_id=i, text=model.texts.token(i), plain=float(p[i]), steered=float(q[i]))
                for i, size in zip(most.indices.tolist(), most.values.tolist(), strict=True)
                if size > 0
            )
        )
    return tuple(found)
