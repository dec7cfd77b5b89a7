"""What the rules of mtc.analysis.rules measure: the values that they compare, and the sentences that tell them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from mtc.config import RunConfig
from mtc.results import Copies, Evaluation, Slice, Summary, Tree, interval, number, percent, whole_range

MIN_ROWS = 5
"""Fewest logged steps whose batch FVU is held against the held-out one: batches differ."""
MIN_RARE = 100
"""Fewest tokens of a slice by frequency that is judged."""


class Evidence(NamedTuple):
    """What the rules of mtc.analysis.rules look at: figures of one run."""

    s: Summary
    c: RunConfig
    evaluation: Evaluation
    tree: Tree | None
    copies: Copies | None


def without(e: Evidence) -> str:
    """What to put behind a headline figure where massive tokens were left out of it."""
    return " but massive ones" if e.s.massive.tokens else ""


def massive_sentence(e: Evidence) -> str:
    m, where = e.s.massive, f"{e.c.model.name}, layer {e.c.model.layer}"
    limit = f"target norms above {number(m.ratio)} times the median"
    if not m.tokens:
        return f"At {where}, none of the {number(e.s.evaluated_tokens)} held-out tokens has {limit}."
    return (
        f"At {where}, {number(m.tokens)} held-out tokens ({percent(m.share)}) with {limit} hold {percent(m.variance)} "
        f"of the variance and {percent(m.error)} of the squared error. FVU is {number(e.s.fvu[-1])} without them, the "
        f"headline figure, and {number(e.s.all_tokens.fvu[-1])} with them."
    )


def sparsity_value(e: Evidence) -> float:
    """How far L0 is from k, as a share of k."""
    return e.s.l0 / e.s.k - 1


def sparsity_of(e: Evidence, activation: str) -> float | None:
    """How far L0 is from k, as a share of k, of a transcoder with this activation function."""
    return abs(sparsity_value(e)) if e.c.transcoder.activation == activation else None


def sparsity_sentence(e: Evidence) -> str:
    beside = f" ({number(e.s.all_tokens.l0[-1])} with massive tokens)" if e.s.massive.tokens else ""
    off = percent(sparsity_value(e))
    return f"Held-out L0 is {number(e.s.l0)}{beside} where k = {number(e.s.k)} was asked, {off} off."


def line_value(e: Evidence, skip: bool) -> float | None:
    """What the features add over the affine map, of a transcoder with a skip connection or of one without."""
    return e.s.line.added if e.s.line and e.c.transcoder.skip == skip else None


def line_sentence(e: Evidence) -> str:
    assert e.s.line is not None
    return (
        f"The least-squares affine map leaves {number(e.s.line.fvu)} of the held-out variance unexplained, the full "
        f"dictionary {number(e.s.fvu[-1])}: its features add {percent(e.s.line.added)}."
    )


def overfitting_value(e: Evidence) -> float | None:
    fit = e.s.training_fit
    return fit.excess if fit and fit.rows >= MIN_ROWS else None


def overfitting_sentence(e: Evidence) -> str:
    assert e.s.training_fit is not None
    return (
        f"The full dictionary's held-out FVU is {number(e.s.fvu[-1])}, its batch FVU "
        f"{number(e.s.training_fit.fvu)} over the last fifth of training ({number(e.s.training_fit.rows)} rows): "
        f"{percent(e.s.training_fit.excess)} more."
    )


def copies_sentence(e: Evidence) -> str:
    assert e.copies is not None
    return (
        f"{number(e.copies.features)} of {number(e.s.total_features)} features ({percent(e.copies.share)}) are copies "
        f"of an earlier one: decoder and encoder cosine above {number(e.copies.cosine)}, and they fire together."
    )


def smallest_gain(e: Evidence) -> float | None:
    return min((a - b for a, b in pairwise(e.s.fvu)), default=None)


def prefix_sentence(e: Evidence) -> str:
    steps = [
        f"{number(b)} with {number(n)} ({'+' if b > a else ''}{number(b - a)})"
        for n, (a, b) in zip(e.s.prefixes[1:], pairwise(e.s.fvu), strict=True)
    ]
    return (
        f"Held-out FVU is {number(e.s.fvu[0])} with the first {number(e.s.prefixes[0])} features, {', '.join(steps)}."
    )


def dead_sentence(e: Evidence) -> str:
    counter = (
        f"; by the training counter {number(e.s.dead_features)} had not fired for "
        f"{number(e.c.transcoder.dead_after_tokens)} tokens"
        if e.s.dead_features is not None
        else ""
    )
    return (
        f"{number(e.s.silent_features)} of {number(e.s.total_features)} features ({percent(e.s.silent_fraction)}) did "
        f"not fire on {number(e.s.analysed_tokens)} held-out tokens{counter}."
    )


def dense_sentence(e: Evidence) -> str:
    return (
        f"{number(e.s.dense_features)} of {number(e.s.total_features)} features ({percent(e.s.dense_fraction)}) fire "
        f"on more than 10 % of the held-out tokens; they make {percent(e.s.dense_activation_share)} of all activations."
    )


def loss_sentence(e: Evidence) -> str:
    assert e.s.loss is not None
    return (
        f"With the transcoder in the MLP's place the language model keeps {percent(e.s.loss.recovered_zero[-1])} of "
        f"the loss between zero ablation and the MLP, {percent(e.s.loss.recovered_mean[-1])} against mean ablation; "
        f"KL {number(e.s.loss.kl[-1])} nats a token over {number(e.s.loss.tokens)} tokens."
    )


def trend_value(e: Evidence, sign: int) -> float | None:
    """Change of the batch FVU in the direction `sign` (1 falls, -1 rises) less two standard errors; None if it goes the
    other way."""
    if e.s.trend is None or sign * e.s.trend.fall < 0:
        return None
    return sign * e.s.trend.fall - 2 * e.s.trend.standard_error


def trend_sentence(e: Evidence) -> str:
    assert e.s.trend is not None
    return (
        f"Over the last fifth of the logged training ({number(e.s.trend.rows)} rows) the batch FVU's fitted line "
        f"{'fell' if e.s.trend.fall >= 0 else 'rose'} by {percent(abs(e.s.trend.fall))} of its mean, with a standard "
        f"error of {percent(e.s.trend.standard_error)}."
    )


def few_sentence(e: Evidence) -> str:
    return (
        f"{percent(e.s.few_samples_fraction)} of the features that fired have fewer than the "
        f"{number(e.c.analysis.max_per_feature)} samples that are kept; a feature with samples has "
        f"{number(e.s.average_samples)} on average."
    )


def interval_width(e: Evidence) -> float | None:
    if e.s.fvu_interval is None or not e.s.fvu[-1]:
        return None
    low, high = e.s.fvu_interval[-1]
    return (high - low) / e.s.fvu[-1]


def interval_sentence(e: Evidence) -> str:
    return (
        f"The full dictionary's FVU is {number(e.s.fvu[-1])}, its 95 % interval {interval(e.s.fvu_interval, -1)}, from "
        f"{number(e.s.documents)} documents."
    )


def rarest(e: Evidence) -> Slice | None:
    """The slice of the rarest tokens of which there are at least MIN_RARE."""
    return next((s for s in e.evaluation.by_frequency if s.tokens >= MIN_RARE), None)


def rare_value(e: Evidence) -> float | None:
    rare = rarest(e)
    return rare.fvu[-1] / e.s.fvu[-1] if rare and e.s.fvu[-1] else None


def rare_sentence(e: Evidence) -> str:
    rare = rarest(e)
    assert rare is not None
    return (
        f"FVU is {number(rare.fvu[-1])} on tokens that occur {whole_range(rare.low, rare.high)} times in the held-out "
        f"text ({number(rare.tokens)} of them), {number(e.s.fvu[-1])} on all{without(e)}."
    )


def empty_value(e: Evidence) -> float | None:
    counts = e.evaluation.l0_counts
    return counts[0] / sum(counts) if sum(counts) else None


def gap_sentence(e: Evidence) -> str:
    loss = e.s.loss
    assert loss is not None
    return (
        f"Setting the MLP's output to zero changes the loss from {number(loss.ce_clean)} to {number(loss.ce_zero)} "
        f"nats ({number(loss.ce_zero - loss.ce_clean)}), the whole of what loss recovered is a share of."
    )


def later(e: Evidence) -> tuple[int, int, int]:
    """Sums over the groups after the first: features, features that fired often enough to tell, features with a
    parent."""
    assert e.tree is not None
    return sum(e.c.transcoder.group_sizes[1:]), sum(e.tree.judged[1:]), sum(e.tree.with_parent[1:])


def judged_value(e: Evidence) -> float | None:
    if e.tree is None:
        return None
    features, judged, _ = later(e)
    return judged / features if features else None


def judged_sentence(e: Evidence) -> str:
    assert e.tree is not None
    features, judged, _ = later(e)
    return (
        f"{number(judged)} of the {number(features)} features of later groups fired often enough to look for a parent, "
        f"on {number(e.tree.tokens)} sampled tokens."
    )


def parents_value(e: Evidence) -> float | None:
    if e.tree is None:
        return None
    _, judged, parents = later(e)
    return parents / judged if judged else None


def parents_sentence(e: Evidence) -> str:
    _, judged, parents = later(e)
    return (
        f"{number(parents)} of {number(judged)} features of later groups refine a feature of an earlier group "
        f"({percent(parents / judged)})."
    )


def absorbed_value(e: Evidence) -> float | None:
    return e.tree.num_absorptions / e.tree.tested_pairs if e.tree and e.tree.tested_pairs else None


def absorbed_sentence(e: Evidence) -> str:
    assert e.tree is not None
    return (
        f"{number(e.tree.num_absorptions)} of {number(e.tree.tested_pairs)} pairs of an earlier and a later feature "
        f"({percent(e.tree.num_absorptions / e.tree.tested_pairs)}) are absorption candidates: the earlier one is "
        "silent where it should fire."
    )
