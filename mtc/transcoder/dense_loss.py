"""The training loss of mtc.transcoder.objective written down as it is defined, for autograd.

Five products of [tokens, d] x [d, features]: the reference of the sparse loss, and the faster one where products are
cheap.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtc.transcoder.activations import ACTIVATIONS
from mtc.transcoder.objective import LossOutput, Objective, PerToken, Weights, scaled_targets


def dense_loss(
    x: Tensor, y: Tensor, weights: Weights, objective: Objective, per_token: PerToken | None = None
) -> LossOutput:
    """The training loss by dense products and autograd. x [tokens, d_source] normalised, y [tokens, d_target] scaled;
    `per_token` is for massive tokens."""
    before = linear(x, weights.W_enc, weights.b_enc)
    a, penalty = ACTIVATIONS[objective.activation].dense(before, weights, objective)
    fired = a.detach() > 0
    if per_token is not None:
        a, y = a * per_token.scale[:, None], scaled_targets(y, weights.b_dec, per_token.scale)
    residual, errors, start = weights.b_dec - y, [], 0
    for end in objective.ends:
        residual = residual + a[:, start:end] @ weights.W_dec[start:end]
        errors.append(residual.square().sum(1))
        start = end
    loss = sum(w * e.sum() for w, e in zip(objective.weights, errors, strict=True))
    if penalty is not None:
        loss = loss + (penalty if per_token is None else penalty * per_token.scale).sum()
    aux_error = y.new_zeros(())
    if len(objective.dead):
        candidates = before[:, objective.dead]
        strongest = candidates.topk(min(objective.aux_k, len(objective.dead)), dim=1)
        a_dead = torch.zeros_like(candidates).scatter(1, strongest.indices, strongest.values)
        if per_token is not None:
            a_dead = a_dead * per_token.scale[:, None]
        aux_error = (residual.detach() + a_dead @ weights.W_dec[objective.dead]).square().sum()
        loss = loss + objective.aux_weight * aux_error
    reported = torch.stack(errors).detach()
    if per_token is not None:
        reported = reported * per_token.counted
    return LossOutput(loss, reported.sum(1), aux_error.detach(), fired.sum(), fired.any(0))  # type: ignore[arg-type]
