"""What the training loss is: its parts at one step, and what the dense and the sparse computation of it give back.

    z     = ReLU(x W_enc^T + b_enc)                        [tokens, features]
    a     = activation(z)                                  k entries per token on average; mtc.transcoder.activations
    R_p   = b_dec + sum over groups g <= p of a_g W_dec_g - y     residual of prefix p, [tokens, d_target]
    loss  = sum over p of w_p ||R_p||^2  +  w_aux ||stop(R_last) + a_dead W_dec_dead||^2
            +  the activation's penalty

x is the normalised source, y the scaled target. The nested sum is that of Matryoshka dictionaries (Bussmann et al.
2025, arXiv:2503.17547). The last term is AuxK (Gao et al. 2024, arXiv:2406.04093): each token's strongest dead features
reconstruct what the last prefix leaves. Their values a_dead are those before the ReLU, since a feature that is negative
on every token gets no gradient through one and stays dead.

A massive token (mtc.transcoder.massive) may be capped: all its residuals are multiplied by s = massive_norm / ||y||, so
that it weighs no more than a token with that norm. s (R - y) is what R's sum leaves of s y if every a is s a, too. Its
part of a penalty is multiplied by s: the gradient of its squared error by an entry is s times one of usual size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objective(NamedTuple):
    """What the training loss of one step is made of, equal on all ranks."""

    ends: tuple[int, ...]
    """One past the last feature of each prefix, increasing; the last is the whole dictionary."""
    weights: tuple[float, ...]
    """Weight of each prefix's squared error, summed over tokens and dimensions."""
    num_entries: int
    """Entries to choose, over all ranks: k * tokens."""
    dead: Tensor
    """[dead features] int64, sorted: the features that AuxK may use; with `sharded` those of this rank."""
    aux_k: int
    """Dead features per token that reconstruct the residual in AuxK."""
    aux_weight: float
    """Weight of AuxK's squared error."""
    activation: str = "batch_topk"
    """Which activations the loss is of, a key of `mtc.transcoder.activations.ACTIVATIONS`."""
    k: int = 0
    """Active features per token; on average, except for TopK."""
    by_contribution: bool = False
    """Whether entries are ranked by z times the norm of the feature's decoder row instead of z."""
    l0_weight: float = 0.0
    """Weight of JumpReLU's penalty, (L0 / k - 1)^2 summed over tokens, massive ones scaled down."""
    bandwidth: float = 0.0
    """Width of the window around JumpReLU's thresholds inside which their gradients are estimated."""
    cap_massive: bool = False
    """Whether a massive token's residuals are scaled down as if its target were no longer than the limit."""
    sharded: bool = False
    """Whether each rank has a share of the features and all tokens, instead of a share of the tokens and all features.
    Then `ends` count this rank's features, and every rank's loss is that of the whole batch."""
    dead_elsewhere: int = 0
    """Features that AuxK may use on other ranks, with `sharded`."""

    @property
    def num_dead(self) -> int:
        """Features that AuxK may use, of the whole dictionary."""
        return len(self.dead) + self.dead_elsewhere

    def rank_scale(self, W_dec: Tensor) -> Tensor | None:
        """[features], what z is multiplied with to rank entries, without gradients; None for 1."""
        return W_dec.detach().norm(dim=1) if self.by_contribution else None


class PerToken(NamedTuple):
    """What massive tokens change."""

    scale: Tensor
    """[tokens], what a token's residuals are multiplied with, and its part of the penalty."""
    counted: Tensor
    """[tokens] bool: whether a token's errors are among those that are reported."""


class LossOutput(NamedTuple):
    loss: Tensor
    """Scalar, this rank's part of the weighted sum of squared errors and the penalty; differentiable."""
    errors: Tensor
    """[prefixes], squared error of each prefix in scaled units, summed over this rank's tokens that count and
    dimensions."""
    aux_error: Tensor
    """Scalar, squared error of AuxK in scaled units, summed over this rank's tokens and dimensions; 0 without dead
    features."""
    num_active: Tensor
    """Scalar, entries of this rank that were chosen."""
    fired: Tensor
    """[features] bool: the feature was chosen at least once on this rank."""


class Weights(NamedTuple):
    W_enc: Tensor
    """[features, d_source], encoder rows."""
    b_enc: Tensor
    """[features], encoder biases."""
    W_dec: Tensor
    """[features, d_target], decoder rows."""
    b_dec: Tensor
    """[d_target], decoder bias."""
    threshold: Tensor | None = None
    """[features], thresholds that are trained; None for activations without."""


def scaled_targets(y: Tensor, b_dec: Tensor, scale: Tensor) -> Tensor:
    """What y [tokens, d_target] becomes so that b_dec - y is multiplied by `scale` [tokens]; b_dec gets its gradient
    through both."""
    return y * scale[:, None] + (1 - scale)[:, None] * b_dec
