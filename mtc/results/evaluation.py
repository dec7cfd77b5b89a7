"""Held-out figures: FVU, sparsity and loss recovered, with their intervals."""

from __future__ import annotations

from mtc.record import Record
from mtc.results.intervals import Intervals


class LossRecovered(Record):
    """Next-token cross-entropy (nats) of the language model with the transcoder in place of its MLP."""

    tokens: int
    """Predicted tokens."""
    documents: int = 0
    """Documents that they are of; more than 1,024 are resampled in as many blocks of whole documents."""
    ce_clean: float
    """The model as it is."""
    ce_zero: float
    """mlp_out replaced by zero."""
    ce_mean: float
    """mlp_out replaced by its mean over held-out tokens."""
    ce_spliced: list[float]
    """mlp_out replaced by the transcoder's reconstruction, per prefix."""
    kl: list[float]
    """Mean KL(clean || spliced) per prefix, nats."""
    recovered_zero: list[float]
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean), per prefix."""
    recovered_mean: list[float]
    """(ce_mean - ce_spliced) / (ce_mean - ce_clean), per prefix."""
    kl_interval: Intervals | None = None
    """95 % interval of `kl`; None with too few documents."""
    recovered_zero_interval: Intervals | None = None
    """95 % interval of `recovered_zero`; None with too few documents."""
    recovered_mean_interval: Intervals | None = None
    """95 % interval of `recovered_mean`; None with too few documents."""


class Slice(Record):
    """Reconstruction of the tokens that share something."""

    low: int
    """Smallest value of what they share."""
    high: int
    """Largest value."""
    tokens: int
    """How many there are."""
    fvu: list[float]
    """Per prefix: their squared error over their squared deviation from the mean of *all* held-out targets."""
    cosine: list[float]
    """Per prefix, mean."""
    l0: float
    """Active features per token, full dictionary."""


class Evaluation(Record):
    """Reconstruction on held-out tokens, at the calibrated threshold."""

    tokens: int
    """Held-out tokens."""
    documents: int = 0
    """Documents that they are of; more than 1,024 are resampled in as many blocks of whole documents."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    fvu: list[float]
    """Fraction of variance unexplained, per prefix."""
    fvu_interval: Intervals | None = None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    cosine: list[float] = []
    """Mean cosine between target and reconstruction, per prefix."""
    l0: list[float]
    """Active features per token within each prefix; the last is the whole dictionary's."""
    l0_interval: Intervals | None = None
    """95 % interval of `l0`; None with too few documents."""
    l0_counts: list[int] = []
    """Tokens with 0, 1, 2, ... active features of the whole dictionary, up to the largest number found."""
    never_fired: int
    """Features that fired on none of these tokens."""
    by_position: list[Slice] = []
    """Tokens by their position in the window, from 0."""
    by_frequency: list[Slice] = []
    """Tokens by how often their id occurs among all held-out tokens of the pass."""
    loss: LossRecovered | None
    """None if not measured."""
