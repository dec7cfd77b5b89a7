"""JumpReLU: a feature is active where its pre-activation is above a threshold of its own, which is trained.

    a = z H(z - theta),   penalty = w (sum of H(z - theta) over features / k - 1)^2 summed over tokens

Rajamanoharan et al. 2024, arXiv:2407.14435, with the quadratic penalty of Gemma Scope 2 (McDougall et al. 2025), which
holds L0 near k. The step H has no gradient, so one is estimated from the entries around it by a rectangle of width eps
(the bandwidth): dH/dz = [|z - theta| < eps / 2] / eps and dH/dtheta = -dH/dz. It reaches the thresholds, and through z
the encoder and all below as well: both papers leave the latter out. Entries that
are active or inside the window are all that the loss touches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtc.transcoder.activations.activation import Activated, Activation
from mtc.transcoder.distributed import sum_over_ranks
from mtc.transcoder.objective import Objective, Weights
from mtc.transcoder.pre_activations import PreActivations
from mtc.transcoder.products import Workspace
from mtc.transcoder.selection import Chosen, entries_above


class JumpReLU(Activation):
    thresholds = "trained"

    def dense(self, before: Tensor, weights: Weights, objective: Objective) -> Activated:
        threshold = _thresholds(weights).expand(before.shape)
        value, step = _Jump.apply(before.to(threshold.dtype), threshold, objective.bandwidth)
        return Activated(value, _penalty(step.sum(1), objective))

    def choose(self, before: PreActivations, objective: Objective, workspace: Workspace) -> Chosen:
        floor = _thresholds(before.weights).detach().to(before.z.dtype) - objective.bandwidth / 2
        if not before.rounded:
            return entries_above(before.z, floor)
        found = entries_above(before.z, floor - before.rounding() - 2**-8 * floor.abs())
        value = before.exact(found.token, found.feature)
        keep = value > floor[found.feature]
        return Chosen(found.token[keep], found.feature[keep], value[keep])

    def active(self, value: Tensor, feature: Tensor, weights: Weights) -> Tensor:
        return value > _thresholds(weights)[feature]

    def sparse(
        self, value: Tensor, token: Tensor, feature: Tensor, tokens: int, weights: Weights, objective: Objective
    ) -> Activated:
        # Indexing with [] would add up its gradient in an order that varies with many entries and threads.
        threshold = _thresholds(weights).index_select(0, feature)
        activation, step = _Jump.apply(value, threshold, objective.bandwidth)
        l0 = step.new_zeros(tokens).index_add(0, token, step)
        return Activated(activation, _penalty(sum_over_ranks(l0) if objective.sharded else l0, objective))


def _thresholds(weights: Weights) -> Tensor:
    if weights.threshold is None:
        raise ValueError("JumpReLU needs weights with thresholds")
    return weights.threshold


def _penalty(l0: Tensor, objective: Objective) -> Tensor:
    return objective.l0_weight * (l0 / objective.k - 1).square()


class _Jump(Function):
    """z H(z - theta) and H(z - theta), element by element, with the estimated gradients of H."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        step = (z > threshold).to(z.dtype)
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * step, step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor, d_step: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        is_near = (z - threshold).abs() < ctx.bandwidth / 2
        # At the step the value jumps by theta.
        estimated = torch.where(is_near, (threshold * d_value + d_step) / ctx.bandwidth, 0.0)
        return d_value * (z > threshold) + estimated, -estimated, None
