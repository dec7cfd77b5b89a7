"""BatchTopK: the k * B largest positive pre-activations of the global batch. Bussmann et al. 2024, arXiv:2412.06410."""

from __future__ import annotations

import torch
from torch import Tensor

from mtc.devices import is_gpu
from mtc.transcoder.activations.activation import Activated, Activation
from mtc.transcoder.objective import Objective, Weights
from mtc.transcoder.pre_activations import PreActivations
from mtc.transcoder.products import Workspace
from mtc.transcoder.selection import Chosen, keep_largest, largest_entries

REFINE = 1.1
"""How many times the wanted entries the bfloat16 product proposes; their values, computed again, decide."""


class BatchTopK(Activation):
    thresholds = "calibrated"

    def dense(self, before: Tensor, weights: Weights, objective: Objective) -> Activated:
        z, scale = torch.relu(before), objective.rank_scale(weights.W_dec)
        rank = z.detach() if scale is None else z.detach() * scale
        keep, _ = keep_largest(rank.float().flatten(), objective.num_entries)
        return Activated(z * keep.view_as(z))

    def choose(self, before: PreActivations, objective: Objective, workspace: Workspace) -> Chosen:
        count, scale = objective.num_entries, objective.rank_scale(before.weights.W_dec)
        if not before.rounded:
            chosen, workspace.border = largest_entries(before.z, count, workspace.border, scale)
            return chosen
        proposed, workspace.border = largest_entries(before.z, round(count * REFINE), workspace.border, scale)
        exact = before.exact(proposed.token, proposed.feature).relu()
        value = torch.where(proposed.value > 0, exact, 0.0)
        keep, _ = keep_largest((value if scale is None else value * scale[proposed.feature]).float(), count)
        if is_gpu(value.device):  # shapes that depend on values would wait for the host; zeros add nothing
            return proposed._replace(value=torch.where(keep, value, 0.0))
        return Chosen(proposed.token[keep], proposed.feature[keep], value[keep])
