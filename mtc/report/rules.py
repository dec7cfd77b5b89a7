"""Insights and recommendations: a table of rules, each a measured value held against a threshold.

Every measurable rule gives one insight, met or not, with its number; a rule that is met also gives a recommendation
that names the configuration field to change. A rule whose value was not measured says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

from mtc.bootstrap import MIN_DOCUMENTS
from mtc.config import RunConfig
from mtc.evaluation import Evaluation, Slice
from mtc.report.format import interval, number, numbers, percent, whole_range
from mtc.report.schema import Finding, Summary, Tree

MIN_RARE = 100
"""Tokens that a slice by frequency must have to be judged."""


class Evidence(NamedTuple):
    """What rules look at."""

    s: Summary
    c: RunConfig
    evaluation: Evaluation
    tree: Tree | None


class Rule(NamedTuple):
    """One row of the table."""

    name: str
    condition: str
    """In words, with the threshold."""
    comparison: Literal["<", ">"]
    threshold: float
    value: Callable[[Evidence], float | None]
    """The number that is compared; None if it was not measured."""
    sentence: Callable[[Evidence], str]
    """What was measured, true whether or not the condition holds."""
    field: str
    advice: str
    """What to do about `field` where the condition holds; the field and its present value are put behind."""

    def met(self, value: float) -> bool:
        return value > self.threshold if self.comparison == ">" else value < self.threshold


def judge(evidence: Evidence) -> tuple[list[Finding], list[Finding]]:
    """Insights and recommendations of all rules that have a value."""
    insights, recommendations = [], []
    for rule in RULES:
        value = rule.value(evidence)
        if value is None or not math.isfinite(value):
            continue
        insight = Finding(
            rule=rule.name, condition=rule.condition, value=value, threshold=rule.threshold, met=rule.met(value),
            text=rule.sentence(evidence),
        )  # fmt: skip
        insights.append(insight)
        if insight.met:
            part, name = rule.field.split(".")
            shown = _setting(getattr(getattr(evidence.c, part), name))
            text = f"{rule.advice} (`{rule.field}` is {shown}). {insight.text}"
            recommendations.append(insight.model_copy(update={"text": text, "field": rule.field}))
    return insights, recommendations


def _setting(value: float | tuple[float, ...] | None) -> str:
    if value is None:
        return "not set"
    return numbers(value) if isinstance(value, tuple) else number(value)


def _smallest_gain(e: Evidence) -> float | None:
    return min((a - b for a, b in pairwise(e.s.fvu)), default=None)


def _prefix_sentence(e: Evidence) -> str:
    steps = [
        f"{number(b)} with {number(n)} ({'+' if b > a else ''}{number(b - a)})"
        for n, (a, b) in zip(e.s.prefixes[1:], pairwise(e.s.fvu), strict=True)
    ]
    return f"Held-out FVU is {number(e.s.fvu[0])} with the first {number(e.s.prefixes[0])} features, {', '.join(steps)}."


def _dead_sentence(e: Evidence) -> str:
    return (
        f"{number(e.s.silent_features)} of {number(e.s.total_features)} features ({percent(e.s.silent_fraction)}) did not "
        f"fire on {number(e.s.analysed_tokens)} held-out tokens; by the training counter {number(e.s.dead_features)} "
        f"had not fired for {number(e.c.transcoder.dead_after_tokens)} tokens."
    )


def _dense_sentence(e: Evidence) -> str:
    return (
        f"{number(e.s.dense_features)} of {number(e.s.total_features)} features ({percent(e.s.dense_fraction)}) fire on more "
        f"than 10 % of the held-out tokens; they make {percent(e.s.dense_activation_share)} of all activations."
    )


def _loss_sentence(e: Evidence) -> str:
    assert e.s.loss is not None
    return (
        f"With the transcoder in the MLP's place the language model keeps {percent(e.s.loss.recovered_zero[-1])} of the "
        f"loss between zero ablation and the MLP, {percent(e.s.loss.recovered_mean[-1])} against mean ablation; "
        f"KL {number(e.s.loss.kl[-1])} nats a token over {number(e.s.loss.tokens)} tokens."
    )


def _trend_value(e: Evidence, sign: int) -> float | None:
    """Change in the direction `sign` (1 falls, -1 rises) less two standard errors; None if it goes the other way."""
    if e.s.trend is None or sign * e.s.trend.fall < 0:
        return None
    return sign * e.s.trend.fall - 2 * e.s.trend.standard_error


def _trend_sentence(e: Evidence) -> str:
    assert e.s.trend is not None
    return (
        f"Over the last fifth of the logged training ({number(e.s.trend.rows)} rows) the batch FVU's fitted line "
        f"{'fell' if e.s.trend.fall >= 0 else 'rose'} by {percent(abs(e.s.trend.fall))} of its mean, with a standard error "
        f"of {percent(e.s.trend.standard_error)}."
    )


def _few_sentence(e: Evidence) -> str:
    return (
        f"{percent(e.s.few_samples_fraction)} of the features that fired have fewer than the "
        f"{number(e.c.analysis.max_per_feature)} samples that are kept; a feature with samples has "
        f"{number(e.s.average_samples)} on average."
    )


def _interval_width(e: Evidence) -> float | None:
    if e.s.fvu_interval is None or not e.s.fvu[-1]:
        return None
    low, high = e.s.fvu_interval[-1]
    return (high - low) / e.s.fvu[-1]


def _interval_sentence(e: Evidence) -> str:
    assert e.s.fvu_interval is not None
    return (
        f"The full dictionary's FVU is {number(e.s.fvu[-1])}, its 95 % interval {interval(e.s.fvu_interval[-1])}, from "
        f"{number(e.s.documents)} documents."
    )


def _rare(e: Evidence) -> Slice | None:
    """The rarest tokens of which there are enough."""
    return next((s for s in e.evaluation.by_frequency if s.tokens >= MIN_RARE), None)


def _rare_value(e: Evidence) -> float | None:
    rare = _rare(e)
    return rare.fvu[-1] / e.s.fvu[-1] if rare and e.s.fvu[-1] else None


def _rare_sentence(e: Evidence) -> str:
    rare = _rare(e)
    assert rare is not None
    return (
        f"FVU is {number(rare.fvu[-1])} on tokens that occur {whole_range(rare.low, rare.high)} times in the held-out "
        f"text ({number(rare.tokens)} of them), {number(e.s.fvu[-1])} on all."
    )


def _empty_value(e: Evidence) -> float | None:
    counts = e.evaluation.l0_counts
    return counts[0] / sum(counts) if sum(counts) else None


def _gap_sentence(e: Evidence) -> str:
    loss = e.s.loss
    assert loss is not None
    return (
        f"Setting the MLP's output to zero changes the loss from {number(loss.ce_clean)} to {number(loss.ce_zero)} "
        f"nats ({number(loss.ce_zero - loss.ce_clean)}), the whole of what loss recovered is a share of."
    )


def _later(e: Evidence) -> tuple[int, int, int]:
    """Of the groups after the first: features, features that fired often enough to tell, features with a parent."""
    assert e.tree is not None
    return sum(e.c.transcoder.group_sizes[1:]), sum(e.tree.judged[1:]), sum(e.tree.with_parent[1:])


def _judged_sentence(e: Evidence) -> str:
    assert e.tree is not None
    features, judged, _ = _later(e)
    return (
        f"{number(judged)} of the {number(features)} features of later groups fired often enough to look for a parent, "
        f"on {number(e.tree.tokens)} sampled tokens."
    )


def _parents_value(e: Evidence) -> float | None:
    if e.tree is None:
        return None
    _, judged, parents = _later(e)
    return parents / judged if judged else None


def _parents_sentence(e: Evidence) -> str:
    _, judged, parents = _later(e)
    return (
        f"{number(parents)} of {number(judged)} features of later groups refine a feature of an earlier group "
        f"({percent(parents / judged)})."
    )


def _absorbed_value(e: Evidence) -> float | None:
    return e.tree.num_absorptions / e.tree.tested_pairs if e.tree and e.tree.tested_pairs else None


def _absorbed_sentence(e: Evidence) -> str:
    assert e.tree is not None
    return (
        f"{number(e.tree.num_absorptions)} of {number(e.tree.tested_pairs)} pairs of an earlier and a later feature "
        f"({percent(e.tree.num_absorptions / e.tree.tested_pairs)}) are absorption candidates: the earlier one is "
        "silent where it should fire."
    )


RULES = (
    Rule(
        "nested prefixes", "smallest fall in FVU by a further prefix < 0.01", "<", 0.01,
        _smallest_gain, _prefix_sentence,
        "transcoder.group_sizes", "Merge or resize the groups: one of them adds little",
    ),
    Rule(
        "reconstruction", "held-out FVU of the full dictionary > 0.5", ">", 0.5,
        lambda e: e.s.fvu[-1],
        lambda e: f"The full dictionary leaves {percent(e.s.fvu[-1])} of the held-out variance unexplained.",
        "transcoder.k", "Allow more active features, train longer or enlarge the dictionary",
    ),
    Rule(
        "direction", "mean cosine of target and reconstruction, full dictionary < 0.7", "<", 0.7,
        lambda e: e.s.cosine[-1] if e.s.cosine else None,
        lambda e: f"The full dictionary's reconstructions have a mean cosine of {number(e.s.cosine[-1])} with their "
        "targets.",
        "transcoder.group_sizes", "Enlarge the dictionary",
    ),
    Rule(
        "rare tokens", f"FVU of the rarest tokens / FVU of all > 1.5 (rarest decade with {MIN_RARE} tokens or more)",
        ">", 1.5,
        _rare_value, _rare_sentence,
        "data.num_tokens", "Train on more tokens, so that rare ones are seen often enough",
    ),
    Rule(
        "interval", "width of the 95 % interval of FVU / FVU > 20 %", ">", 0.2,
        _interval_width, _interval_sentence,
        "analysis.num_tokens", "Evaluate on more tokens, of more held-out documents",
    ),
    Rule(
        "documents", f"documents that held-out metrics are of < {MIN_DOCUMENTS}", "<", MIN_DOCUMENTS,
        lambda e: float(e.s.documents),
        lambda e: f"The held-out tokens are of {number(e.s.documents)} documents; intervals take {MIN_DOCUMENTS} or "
        "more.",
        "data.heldout_fraction", "Hold out more documents, or split the data into more of them",
    ),
    Rule(
        "sparsity", "|L0 / k - 1| > 5 %", ">", 0.05,
        lambda e: abs(e.s.l0 / e.s.k - 1),
        lambda e: f"Held-out L0 is {number(e.s.l0)} where k = {number(e.s.k)} was asked, {percent(e.s.l0 / e.s.k - 1)} off.",
        "transcoder.calibration_tokens", "Calibrate the threshold on more tokens",
    ),
    Rule(
        "empty tokens", "held-out tokens with no active feature > 1 %", ">", 0.01,
        _empty_value,
        lambda e: f"No feature is active on {percent(_empty_value(e))} of the held-out tokens.",
        "transcoder.k", "Allow more active features",
    ),
    Rule(
        "dead features", "features silent on the held-out tokens > 5 %", ">", 0.05,
        lambda e: e.s.silent_fraction, _dead_sentence,
        "transcoder.aux_coefficient", "Raise the weight of the loss that revives dead features",
    ),
    Rule(
        "dead counter", "trained tokens / dead_after_tokens < 1", "<", 1,
        lambda e: e.s.trained_tokens / e.c.transcoder.dead_after_tokens,
        lambda e: f"Training saw {number(e.s.trained_tokens)} tokens; a feature counts as dead after "
        f"{number(e.c.transcoder.dead_after_tokens)}, so with fewer trained tokens none can and AuxK never acts.",
        "transcoder.dead_after_tokens", "Lower it below the length of training",
    ),
    Rule(
        "dense features", "features that fire on more than 10 % of tokens > 1 %", ">", 0.01,
        lambda e: e.s.dense_fraction, _dense_sentence,
        "transcoder.k", "Use fewer active features or a larger dictionary",
    ),
    Rule(
        "loss recovered", "loss recovered against zero ablation < 90 %", "<", 0.9,
        lambda e: e.s.loss.recovered_zero[-1] if e.s.loss and e.s.loss.ce_zero > e.s.loss.ce_clean else None,
        _loss_sentence,
        "data.num_tokens", "Train on more tokens, or allow more active features",
    ),
    Rule(
        "ablation gap", "rise of the loss by zero ablation < 0.01 nats", "<", 0.01,
        lambda e: e.s.loss.ce_zero - e.s.loss.ce_clean if e.s.loss else None, _gap_sentence,
        "model.layer", "Read another layer, where the MLP matters more, or do not rely on loss recovered",
    ),
    Rule(
        "loss measured", "tokens with the transcoder spliced in < 1", "<", 1,
        lambda e: float(e.s.loss.tokens if e.s.loss else 0),
        lambda e: f"The language model's loss was measured on {number(e.s.loss.tokens if e.s.loss else 0)} tokens.",
        "analysis.loss_tokens", "Set it to see what the reconstruction costs the language model",
    ),
    Rule(
        "still improving", "fall of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda e: _trend_value(e, 1), _trend_sentence,
        "data.num_tokens", "Train longer",
    ),
    Rule(
        "getting worse", "rise of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda e: _trend_value(e, -1), _trend_sentence,
        "optimizer.lr", "Lower the learning rate",
    ),
    Rule(
        "nested features", "features of later groups with a parent < 25 %", "<", 0.25,
        _parents_value, _parents_sentence,
        "transcoder.group_sizes", "Make the first group larger: later features stand alone",
    ),
    Rule(
        "judged features", "features of later groups that fired often enough to look for a parent < 50 %", "<", 0.5,
        lambda e: _later(e)[1] / _later(e)[0] if e.tree and _later(e)[0] else None, _judged_sentence,
        "analysis.coactivation_tokens", "Sample more tokens for the tree",
    ),
    Rule(
        "absorption", "absorption candidates among the tested pairs > 25 %", ">", 0.25,
        _absorbed_value, _absorbed_sentence,
        "transcoder.prefix_weights", "Give the first prefixes more weight in the loss",
    ),
    Rule(
        "few samples", "features that fired with fewer than max_per_feature samples > 50 %", ">", 0.5,
        lambda e: e.s.few_samples_fraction, _few_sentence,
        "analysis.num_tokens", "Analyse more tokens",
    ),
    Rule(
        "held-out text", "analysed tokens / analysis.num_tokens < 95 %", "<", 0.95,
        lambda e: e.s.analysed_tokens / e.c.analysis.num_tokens,
        lambda e: f"{number(e.s.analysed_tokens)} held-out tokens were analysed; "
        f"{number(e.c.analysis.num_tokens)} were asked for.",
        "data.heldout_fraction", "Hold out more text, or add documents",
    ),
)  # fmt: skip
