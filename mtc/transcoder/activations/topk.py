"""TopK: the k largest positive pre-activations of each token (Gao et al. 2024, arXiv:2406.04093), also at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from mtc.transcoder.activations.activation import Activated, Activation
from mtc.transcoder.objective import Objective, Weights
from mtc.transcoder.pre_activations import PreActivations
from mtc.transcoder.products import Workspace
from mtc.transcoder.selection import Chosen, largest_of_each

REFINE = 1.25
"""How many times the wanted entries of each token the bfloat16 product proposes; their values, computed again,
decide."""


class TopK(Activation):
    thresholds = "none"

    def dense(self, before: Tensor, weights: Weights, objective: Objective) -> Activated:
        scale = objective.rank_scale(weights.W_dec)
        token, feature, _ = largest_of_each(before.detach().float(), objective.k, scale)
        keep = torch.zeros_like(before, dtype=torch.bool)
        keep[token, feature] = True
        return Activated(torch.relu(before) * keep)

    def choose(self, before: PreActivations, objective: Objective, workspace: Workspace) -> Chosen:
        k, scale = objective.k, objective.rank_scale(before.weights.W_dec)
        if not before.rounded:
            return largest_of_each(before.z, k, scale, objective.sharded)
        z = before.z if scale is None else before.z * scale
        feature = z.topk(min(round(k * REFINE) + 1, z.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
        token = torch.arange(len(z), device=z.device).repeat_interleave(feature.shape[1])
        exact = before.exact(token, feature.flatten()).view_as(feature)
        chosen = largest_of_each(exact, k, None if scale is None else scale[feature], objective.sharded)
        return chosen._replace(feature=feature[chosen.token, chosen.feature])
