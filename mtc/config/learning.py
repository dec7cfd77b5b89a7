"""What is trained, and how: the dictionary and the optimizer."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

from pydantic import Field, model_validator

from mtc.config.part import MOST, MOST_FEATURES, MOST_SEED, Part

L0_COEFFICIENT, BANDWIDTH = 1.0, 1.0
"""Defaults of `transcoder.activation: jumprelu`; see docs/concepts.md."""


class TranscoderConfig(Part):
    """The dictionary and its training objective."""

    group_sizes: tuple[int, ...] = Field(min_length=1)
    """Features that each nested prefix adds; prefixes are the cumulative sums."""
    k: int = Field(ge=1, le=MOST_FEATURES)
    """Active features per token: on average over the global batch, for `topk` of every token; the target of
    `jumprelu`."""
    activation: Literal["batch_topk", "topk", "jumprelu"] = "batch_topk"
    """Which features are active: the `k` largest per token on average over the batch, at inference those above a
    threshold that is calibrated after training; each token's `k` largest, also at inference; or those above thresholds
    that are trained, one for each feature."""
    rank: Literal["activation", "contribution"] = "activation"
    """What features compete with to be active. `contribution` is the activation times the norm of the feature's decoder
    row, once the learning rate has warmed up; the threshold is then one for each feature."""
    l0_coefficient: float = Field(default=L0_COEFFICIENT, ge=0, le=1e6)
    """Weight of `jumprelu`'s penalty on active features per token, (L0 / k - 1)^2."""
    bandwidth: float = Field(default=BANDWIDTH, gt=0, le=1e6)
    """Width of the window around `jumprelu`'s thresholds inside which their gradients are estimated."""
    input_norm: Literal["rms", "scalar", "none"] | None = None
    """How the source is scaled; by default `rms` for resid_mid and `scalar` otherwise."""
    aux_coefficient: float = Field(default=1 / 32, ge=0, le=1e6)
    """Weight of the AuxK loss, which revives dead features; 0 turns it off."""
    aux_k: int = Field(default=16, ge=1, le=MOST_FEATURES)
    """Dead features per token that reconstruct the residual."""
    dead_after_tokens: int = Field(default=1_000_000, ge=1, le=MOST)
    """Tokens of training without firing after which a feature is dead."""
    skip: bool = False
    """Add an affine map of the source to every reconstruction, beside the features."""
    prefix_weights: tuple[float, ...] | None = None
    """Relative weights of the prefixes' errors in the loss; by default equal."""
    calibration_tokens: int = Field(default=65_536, ge=1, le=MOST)
    """Fresh tokens on which the inference threshold is set, after training; none where it is not calibrated."""
    massive_tokens: Literal["cap", "keep"] = "cap"
    """What a massive token, whose target is more than 5 times as long as the median, weighs in the loss: as much as one
    of that length, or its full square."""
    init: Literal["tokens", "mlp"] = "tokens"
    """Where the encoder starts: at source tokens of the first activations, or at the directions that the MLP's own
    neurons look for (of a gated MLP its gate's), the strongest first, and at tokens once these are used up."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of the initial encoder."""

    @property
    def num_features(self) -> int:
        return sum(self.group_sizes)

    @property
    def fresh_tokens(self) -> int:
        """Tokens that are kept for calibration."""
        return self.calibration_tokens if self.activation == "batch_topk" else 0

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(accumulate(self.group_sizes))

    @model_validator(mode="after")
    def _check(self) -> TranscoderConfig:
        bad = [g for g in self.group_sizes if g <= 0]
        if bad:
            raise ValueError(f"transcoder.group_sizes must all be positive, got {list(self.group_sizes)}")
        if self.num_features > MOST_FEATURES:
            raise ValueError(
                f"transcoder.group_sizes={list(self.group_sizes)} sum to {self.num_features}; "
                f"at most {MOST_FEATURES} is wanted"
            )
        weights = self.prefix_weights
        if weights is not None and (
            len(weights) != len(self.group_sizes) or min(weights) < 0 or max(weights) > 1e6 or sum(weights) <= 0
        ):
            raise ValueError(
                f"transcoder.prefix_weights={list(weights)} must be one number of at least 0, at most 1e6, for each "
                f"of the {len(self.group_sizes)} groups of transcoder.group_sizes, not all 0"
            )
        if self.k > self.num_features:
            raise ValueError(
                f"transcoder.k={self.k} is larger than the dictionary: "
                f"transcoder.group_sizes={list(self.group_sizes)} sum to {self.num_features}"
            )
        if self.rank == "contribution" and self.activation == "jumprelu":
            raise ValueError(
                "transcoder.rank=contribution with transcoder.activation=jumprelu: there nothing is ranked"
            )
        return self


class OptimizerConfig(Part):
    """Adam with a linear warm-up, a constant rate and a linear decay."""

    lr: float | None = Field(default=None, gt=0, le=1)
    """Peak learning rate; by default LR_AT_1152 * sqrt(batch_tokens / 1024 * 1152 / features)."""
    betas: tuple[float, float] = (0.8, 0.99)
    """Adam's averaging factors."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Adam's epsilon."""
    batch_tokens: int = Field(default=1024, ge=1, le=1 << 27)
    """Tokens in the global batch of a step, over all trainers."""
    warmup_steps: int = Field(default=500, ge=0, le=MOST)
    """Steps of the linear warm-up of the learning rate."""
    decay_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of the steps, at the end, over which the learning rate falls."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of the peak learning rate at the last step."""
    gradient_clip: float = Field(default=1.0, gt=0, le=1e9)
    """Largest global gradient norm; a larger gradient is scaled down to it."""
    max_skipped_steps: int = Field(default=10, ge=1, le=MOST)
    """Most steps in a row whose gradient is not finite, so that they change no weights. After so many, which is looked
    at whenever metrics are logged, the trainers go back to the last checkpoint."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the transcoder's products; weights, loss and optimizer stay float32. The sparse backend only looks
    for active features in bfloat16 and computes their values in float32. `auto` is bfloat16 where it is fast."""
    backend: Literal["auto", "dense", "sparse"] = "auto"
    """How the loss and its gradients are computed. `auto` times both at the first step; on a GPU it goes by what was
    recorded for it. The result is the same up to rounding, so name one for runs that must agree bit for bit."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {list(self.betas)}")
        return self
