"""Insights and recommendations: a table of rules, each a measured value held against a threshold.

Every measurable rule gives one insight, met or not, with its number; a rule that is met also gives a recommendation
that names the configuration field to change. A rule whose value was not measured says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from mtc.analysis import evidence
from mtc.analysis.evidence import Evidence
from mtc.results import MIN_DOCUMENTS, Finding, number, percent
from mtc.results.numbers import numbers


class Rule(NamedTuple):
    """A rule: a measured value, the threshold that it is held against, and what to say."""

    name: str
    condition: str
    """When the rule is met, in words, with the threshold."""
    comparison: Literal["<", ">"]
    threshold: float
    value: Callable[[Evidence], float | None]
    """Number that is held against the threshold; None if it was not measured."""
    sentence: Callable[[Evidence], str]
    """Sentence that tells what was measured, true whether or not the condition holds."""
    field: str
    advice: str
    """What to do about `field` where the rule is met; the field and its present value are put behind."""

    def met(self, value: float) -> bool:
        return value > self.threshold if self.comparison == ">" else value < self.threshold


def judge(found: Evidence) -> tuple[list[Finding], list[Finding]]:
    """Insights of all rules that have a value, and recommendations of those that are met."""
    insights, recommendations = [], []
    for rule in RULES:
        value = rule.value(found)
        if value is None or not math.isfinite(value):
            continue
        insight = Finding(
            rule=rule.name, condition=rule.condition, value=value, threshold=rule.threshold, met=rule.met(value),
            text=rule.sentence(found),
        )  # fmt: skip
        insights.append(insight)
        if insight.met:
            part, name = rule.field.split(".")
            shown = _setting(getattr(getattr(found.c, part), name))
            text = f"{rule.advice} (`{rule.field}` is {shown}). {insight.text}"
            recommendations.append(insight.model_copy(update={"text": text, "field": rule.field}))
    return insights, recommendations


def _setting(value: float | tuple[float, ...] | None) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return numbers(value) if isinstance(value, tuple) else number(value)


RULES = (
    Rule(
        "nested prefixes", "smallest fall in FVU by a further prefix < 0.01", "<", 0.01,
        evidence.smallest_gain, evidence.prefix_sentence,
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
        "massive tokens", "share of the variance that massive tokens hold > 10 %", ">", 0.1,
        lambda e: e.s.massive.variance, evidence.massive_sentence,
        "model.layer", "Judge by the figures without massive tokens, or read a layer that has none",
    ),
    Rule(
        "straight line", "without a skip connection, what the features add over the least-squares affine map < 10 %",
        "<", 0.1,
        lambda e: evidence.line_value(e, skip=False), evidence.line_sentence,
        "transcoder.skip", "Turn the skip connection on, so that features need not imitate a straight line",
    ),
    Rule(
        "features beside the skip connection",
        "with a skip connection, what the features add over the least-squares affine map < 10 %", "<", 0.1,
        lambda e: evidence.line_value(e, skip=True), evidence.line_sentence,
        "transcoder.k", "Allow more active features, train longer or enlarge the dictionary",
    ),
    Rule(
        "overfitting",
        f"held-out FVU / training FVU - 1 > 10 % ({evidence.MIN_ROWS} logged training steps or more)",
        ">", 0.1,
        evidence.overfitting_value, evidence.overfitting_sentence,
        "data.replays", "Capture more tokens, or train each less often",
    ),
    Rule(
        "rare tokens",
        f"FVU of the rarest tokens / FVU of all > 1.5 (rarest decade with {evidence.MIN_RARE} tokens or more)",
        ">", 1.5,
        evidence.rare_value, evidence.rare_sentence,
        "data.num_tokens", "Train on more tokens, so that rare ones are seen often enough",
    ),
    Rule(
        "interval", "width of the 95 % interval of FVU / FVU > 20 %", ">", 0.2,
        evidence.interval_width, evidence.interval_sentence,
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
        lambda e: evidence.sparsity_of(e, "batch_topk"),
        evidence.sparsity_sentence,
        "transcoder.calibration_tokens", "Calibrate the threshold on more tokens",
    ),
    Rule(
        "sparsity as trained", "|L0 / k - 1| > 5 % of thresholds that were trained", ">", 0.05,
        lambda e: evidence.sparsity_of(e, "jumprelu"),
        evidence.sparsity_sentence,
        "transcoder.l0_coefficient", "Raise the weight of the penalty on L0, or train longer",
    ),
    Rule(
        "fewer than k", "|L0 / k - 1| > 5 % where the k largest pre-activations are taken", ">", 0.05,
        lambda e: evidence.sparsity_of(e, "topk"),
        evidence.sparsity_sentence,
        "optimizer.lr", "Lower it, or transcoder.k: on many tokens fewer than k pre-activations are positive",
    ),
    Rule(
        "empty tokens", "held-out tokens with no active feature > 1 %", ">", 0.01,
        evidence.empty_value,
        lambda e: f"No feature is active on {percent(evidence.empty_value(e))} of the held-out tokens.",
        "transcoder.k", "Allow more active features",
    ),
    Rule(
        "dead features", "features silent on the held-out tokens > 5 %", ">", 0.05,
        lambda e: e.s.silent_fraction, evidence.dead_sentence,
        "transcoder.aux_coefficient", "Raise the weight of the loss that revives dead features",
    ),
    Rule(
        "dead counter", "trained tokens / dead_after_tokens < 1", "<", 1,
        lambda e: e.s.trained_tokens / e.c.transcoder.dead_after_tokens if e.s.trained_tokens else None,
        lambda e: f"Training saw {number(e.s.trained_tokens)} tokens; a feature counts as dead after "
        f"{number(e.c.transcoder.dead_after_tokens)}, so with fewer trained tokens none can and AuxK never acts.",
        "transcoder.dead_after_tokens", "Lower it below the length of training",
    ),
    Rule(
        "dense features", "features that fire on more than 10 % of tokens > 1 %", ">", 0.01,
        lambda e: e.s.dense_fraction, evidence.dense_sentence,
        "transcoder.k", "Use fewer active features or a larger dictionary",
    ),
    Rule(
        "copies", "features that are copies of an earlier one > 0.5 %", ">", 0.005,
        lambda e: e.copies.share if e.copies else None, evidence.copies_sentence,
        "transcoder.group_sizes", "Make the dictionary smaller: part of it is spent twice",
    ),
    Rule(
        "loss recovered", "loss recovered against zero ablation < 90 %", "<", 0.9,
        lambda e: e.s.loss.share_of_zero(-1) if e.s.loss else None,
        evidence.loss_sentence,
        "data.num_tokens", "Train on more tokens, or allow more active features",
    ),
    Rule(
        "ablation gap", "rise of the loss by zero ablation < 0.01 nats", "<", 0.01,
        lambda e: e.s.loss.ce_zero - e.s.loss.ce_clean if e.s.loss else None, evidence.gap_sentence,
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
        lambda e: evidence.trend_value(e, 1), evidence.trend_sentence,
        "data.num_tokens", "Train longer",
    ),
    Rule(
        "getting worse", "rise of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda e: evidence.trend_value(e, -1), evidence.trend_sentence,
        "optimizer.lr", "Lower the learning rate",
    ),
    Rule(
        "nested features", "features of later groups with a parent < 25 %", "<", 0.25,
        evidence.parents_value, evidence.parents_sentence,
        "transcoder.group_sizes", "Make the first group larger: later features stand alone",
    ),
    Rule(
        "judged features", "features of later groups that fired often enough to look for a parent < 50 %", "<", 0.5,
        evidence.judged_value, evidence.judged_sentence,
        "analysis.coactivation_tokens", "Sample more tokens for the tree",
    ),
    Rule(
        "absorption", "absorption candidates among the tested pairs > 25 %", ">", 0.25,
        evidence.absorbed_value, evidence.absorbed_sentence,
        "transcoder.prefix_weights", "Give the first prefixes more weight in the loss",
    ),
    Rule(
        "few samples", "features that fired with fewer than max_per_feature samples > 50 %", ">", 0.5,
        lambda e: e.s.few_samples_fraction, evidence.few_sentence,
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
