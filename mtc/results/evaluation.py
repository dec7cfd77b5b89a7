"""Held-out figures: FVU, sparsity and loss recovered, with their intervals.

`fvu`, `cosine` and `l0` are headline figures: of all tokens but the massive ones, whose targets are longer than 5 times
the median (mtc.transcoder.massive). The same figures of all tokens are in `all_tokens`.
"""

from __future__ import annotations

from mtc.record import Record
from mtc.results.features import TokenCount
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

    def share_of_zero(self, prefix: int) -> float | None:
        """`recovered_zero` of the prefix with this number; None where zero ablation does not raise the loss, so that
        the quotient is a share of nothing."""
        return self.recovered_zero[prefix] if self.ce_zero > self.ce_clean else None

    def share_of_mean(self, prefix: int) -> float | None:
        """The same of `recovered_mean`."""
        return self.recovered_mean[prefix] if self.ce_mean > self.ce_clean else None


class AllTokens(Record):
    """Headline figures of all held-out tokens, massive ones included; where there are none, the headline figures."""

    fvu: list[float]
    """Fraction of the variance of all tokens' targets that is unexplained, per prefix."""
    fvu_interval: Intervals | None = None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    cosine: list[float] = []
    """Mean cosine between target and reconstruction over all tokens, per prefix."""
    l0: list[float]
    """Active features per token within each prefix, mean over all tokens."""
    l0_interval: Intervals | None = None
    """95 % interval of `l0`; None with too few documents."""


class Massive(Record):
    """The massive tokens among the held-out ones, which are left out of headline figures."""

    ratio: float
    """Norm of a target, in median norms of the first activations, above which its token is massive."""
    norm: float
    """Raw norm of a target above which its token is massive; NaN if it is not known, and then none is."""
    in_weights: bool
    """Whether the weights file has that norm, from training's first activations; otherwise it is of the first held-out
    ones, and training, if any, did not tell massive tokens from others."""
    tokens: int
    """Held-out tokens that are massive."""
    share: float
    """Share of the held-out tokens that are massive, from 0 to 1."""
    variance: float
    """Share that massive tokens have in the squared deviation of all targets from their mean, from 0 to 1."""
    error: float
    """Share that massive tokens have in the squared error of the full dictionary, from 0 to 1."""
    l0: float | None
    """Active features of the full dictionary per massive token, mean; None without any."""
    first_positions: int
    """Positions of a window that count as its first ones."""
    beyond_first: float | None
    """Share of the massive tokens that lie beyond the first positions of their window, from 0 to 1; None without
    any."""
    different_ids: int
    """Ids of the vocabulary of which there is a massive token."""
    top_tokens: tuple[TokenCount, ...]
    """The most frequent massive tokens, each with how many there are, most first; equal counts by id."""

    def fvu(self, all_tokens_fvu: float) -> float | None:
        """FVU of the massive tokens alone, full dictionary: their squared error over their squared deviation from the
        mean of all targets; None without any. `all_tokens_fvu` is that of all tokens."""
        return all_tokens_fvu * self.error / self.variance if self.tokens else None


class StraightLine(Record):
    """How well a straight line does instead of the transcoder: the least-squares affine map from the source, scaled as
    the transcoder scales it, to the target. No token is judged by a map that was fitted to it."""

    fvu: float
    """FVU of the map on the held-out tokens that are not massive, fitted to such tokens."""
    added: float
    """What the full dictionary adds over the map: 1 - FVU / FVU of the map; negative if the map is better."""
    all_tokens_fvu: float
    """FVU of the map on all held-out tokens, fitted to all."""
    all_tokens_added: float
    """What the full dictionary adds over the map on all held-out tokens: 1 - FVU / FVU of the map."""
    folds: int
    """Parts of the held-out tokens; each is judged by the map that was fitted to the others."""


class Slice(Record):
    """Reconstruction of the held-out tokens whose position, or whose frequency, lies in one range; massive ones are
    left out."""

    low: int
    """Smallest position or frequency in the range."""
    high: int
    """Largest position or frequency in the range."""
    tokens: int
    """Held-out tokens in the range."""
    massive: int = 0
    """Massive tokens in the range, which `tokens` does not count and no figure here is of."""
    fvu: list[float]
    """Squared error of the tokens in the range over their squared deviation from the mean of the targets in *all*
    ranges, per prefix."""
    cosine: list[float]
    """Mean cosine between target and reconstruction over the tokens in the range, per prefix."""
    l0: float
    """Active features of the whole dictionary per token in the range, mean."""


class Evaluation(Record):
    """Reconstruction on held-out tokens, at the calibrated threshold. Massive tokens are in `all_tokens` and `massive`,
    and in no other figure of the reconstruction or of active features per token."""

    tokens: int
    """Held-out tokens on which reconstruction was measured, massive ones included."""
    documents: int = 0
    """Documents of the held-out tokens; more than 1,024 are resampled in as many blocks of whole documents."""
    prefixes: list[int]
    """Sizes of the nested dictionaries in features, ascending."""
    fvu: list[float]
    """Fraction of the targets' variance that is unexplained, without massive tokens, per prefix."""
    fvu_interval: Intervals | None = None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    cosine: list[float] = []
    """Mean cosine between target and reconstruction, without massive tokens, per prefix."""
    l0: list[float]
    """Active features per token within each prefix, mean, without massive tokens; the last is of the whole
    dictionary."""
    l0_interval: Intervals | None = None
    """95 % interval of `l0`; None with too few documents."""
    l0_counts: list[int] = []
    """Tokens with 0, 1, 2, ... active features of the whole dictionary, up to the largest number found, without massive
    tokens."""
    all_tokens: AllTokens
    """FVU, cosine and L0 of all tokens, massive ones included."""
    massive: Massive
    """Which tokens are massive, and what they hold."""
    line: StraightLine | None = None
    """How well the least-squares affine map does; None with too few tokens to fit it."""
    never_fired: int
    """Features that fired on none of the held-out tokens, massive ones included."""
    by_position: list[Slice] = []
    """Reconstruction by the tokens' position in the window, from 0."""
    by_frequency: list[Slice] = []
    """Reconstruction by how often the tokens' id occurs among all held-out tokens of the pass."""
    loss: LossRecovered | None
    """Next-token loss of the language model with the transcoder in its MLP's place, of all tokens; None if it was not
    measured."""
