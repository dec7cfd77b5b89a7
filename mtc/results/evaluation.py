"""Held-out figures: FVU, sparsity and loss recovered, with their intervals."""

from __future__ import annotations

from mtc.record import Record
from mtc.results.intervals import Intervals


class LossRecovered(Record):
    """Next-token cross-entropy (nats) of the language model with the transcoder in place of its MLP."""

    tokens: int
    """Tokens whose prediction was measured."""
    documents: int = 0
    """Documents of the predicted tokens; more than 1,024 are resampled in as many blocks of whole documents."""
    ce_clean: float
    """Mean cross-entropy of the language model as it is, nats per token."""
    ce_zero: float
    """Mean cross-entropy with mlp_out replaced by zero, nats per token."""
    ce_mean: float
    """Mean cross-entropy with mlp_out replaced by its mean over held-out tokens, nats per token."""
    ce_spliced: list[float]
    """Mean cross-entropy with mlp_out replaced by the transcoder's reconstruction, nats per token, per prefix."""
    kl: list[float]
    """Mean KL divergence of the spliced model's next-token distribution from the clean one's, KL(clean || spliced),
    nats per token, per prefix."""
    recovered_zero: list[float]
    """Share of the loss of zero ablation that is recovered, (ce_zero - ce_spliced) / (ce_zero - ce_clean), per
    prefix."""
    recovered_mean: list[float]
    """Share of the loss of mean ablation that is recovered, (ce_mean - ce_spliced) / (ce_mean - ce_clean), per
    prefix."""
    kl_interval: Intervals | None = None
    """95 % interval of `kl`; None with too few documents."""
    recovered_zero_interval: Intervals | None = None
    """95 % interval of `recovered_zero`; None with too few documents."""
    recovered_mean_interval: Intervals | None = None
    """95 % interval of `recovered_mean`; None with too few documents."""


class Slice(Record):
    """Reconstruction of the held-out tokens whose position, or whose frequency, lies in one range."""

    low: int
    """Smallest position or frequency in the range."""
    high: int
    """Largest position or frequency in the range."""
    tokens: int
    """Held-out tokens in the range."""
    fvu: list[float]
    """Squared error of the tokens in the range over their squared deviation from the mean of *all* held-out targets,
    per prefix."""
    cosine: list[float]
    """Mean cosine between target and reconstruction over the tokens in the range, per prefix."""
    l0: float
    """Active features of the whole dictionary per token in the range, mean."""


class Evaluation(Record):
    """Reconstruction on held-out tokens, at the calibrated threshold."""

    tokens: int
    """Held-out tokens on which reconstruction was measured."""
    documents: int = 0
    """Documents of the held-out tokens; more than 1,024 are resampled in as many blocks of whole documents."""
    prefixes: list[int]
    """Sizes of the nested dictionaries in features, ascending."""
    fvu: list[float]
    """Fraction of the targets' variance that is unexplained, per prefix."""
    fvu_interval: Intervals | None = None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    cosine: list[float] = []
    """Mean cosine between target and reconstruction, per prefix."""
    l0: list[float]
    """Active features per token within each prefix, mean; the last is the whole dictionary's."""
    l0_interval: Intervals | None = None
    """95 % interval of `l0`; None with too few documents."""
    l0_counts: list[int] = []
    """Tokens with 0, 1, 2, ... active features of the whole dictionary, up to the largest number found."""
    never_fired: int
    """Features that fired on none of the held-out tokens."""
    by_position: list[Slice] = []
    """Reconstruction by the tokens' position in the window, from 0."""
    by_frequency: list[Slice] = []
    """Reconstruction by how often the tokens' id occurs among all held-out tokens of the pass."""
    loss: LossRecovered | None
    """Next-token loss of the language model with the transcoder in its MLP's place; None if it was not measured."""
