"""Insights and recommendations: a table of rules, each a measured value held against a threshold.

Every measurable rule gives one insight, met or not, with its number; a rule that is met also gives a recommendation
that names the configuration field to change. A rule whose value was not measured says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

from mtc.config import RunConfig
from mtc.report.format import number, numbers, percent
from mtc.report.schema import Finding, Summary


class Rule(NamedTuple):
    """One row of the table; functions take the summary and the configuration."""

    name: str
    condition: str
    comparison: Literal["<", ">"]
    threshold: float
    value: Callable[[Summary, RunConfig], float | None]
    """The number that is compared; None if it was not measured."""
    sentence: Callable[[Summary, RunConfig], str]
    """What was measured, true whether or not the condition holds."""
    field: str
    advice: str
    """What to do about `field` where the condition holds; the field and its present value are put in front."""

    def met(self, value: float) -> bool:
        return value > self.threshold if self.comparison == ">" else value < self.threshold


def judge(summary: Summary, config: RunConfig) -> tuple[list[Finding], list[Finding]]:
    """Insights and recommendations of all rules that have a value."""
    insights, recommendations = [], []
    for rule in RULES:
        value = rule.value(summary, config)
        if value is None or not math.isfinite(value):
            continue
        insight = Finding(
            rule=rule.name, condition=rule.condition, value=value, threshold=rule.threshold, met=rule.met(value),
            text=rule.sentence(summary, config),
        )  # fmt: skip
        insights.append(insight)
        if insight.met:
            part, name = rule.field.split(".")
            present = getattr(getattr(config, part), name)
            shown = numbers(present) if isinstance(present, tuple) else number(present)
            text = f"{rule.advice} (`{rule.field}` is {shown}). {insight.text}"
            recommendations.append(insight.model_copy(update={"text": text, "field": rule.field}))
    return insights, recommendations


def _smallest_gain(s: Summary, c: RunConfig) -> float | None:
    return min((a - b for a, b in pairwise(s.fvu)), default=None)


def _prefix_sentence(s: Summary, c: RunConfig) -> str:
    steps = [
        f"{number(b)} with {number(n)} ({'+' if b > a else ''}{number(b - a)})"
        for n, (a, b) in zip(s.prefixes[1:], pairwise(s.fvu), strict=True)
    ]
    return f"Held-out FVU is {number(s.fvu[0])} with the first {number(s.prefixes[0])} features, {', '.join(steps)}."


def _dead_sentence(s: Summary, c: RunConfig) -> str:
    return (
        f"{number(s.silent_features)} of {number(s.total_features)} features ({percent(s.silent_fraction)}) did not "
        f"fire on {number(s.analysed_tokens)} held-out tokens; by the training counter {number(s.dead_features)} "
        f"had not fired for {number(c.transcoder.dead_after_tokens)} tokens."
    )


def _dense_sentence(s: Summary, c: RunConfig) -> str:
    return (
        f"{number(s.dense_features)} of {number(s.total_features)} features ({percent(s.dense_fraction)}) fire on more "
        f"than 10 % of the held-out tokens; they make {percent(s.dense_activation_share)} of all activations."
    )


def _loss_sentence(s: Summary, c: RunConfig) -> str:
    assert s.loss is not None
    return (
        f"With the transcoder in the MLP's place the language model keeps {percent(s.loss.recovered_zero[-1])} of the "
        f"loss between zero ablation and the MLP, {percent(s.loss.recovered_mean[-1])} against mean ablation; "
        f"KL {number(s.loss.kl[-1])} nats a token over {number(s.loss.tokens)} tokens."
    )


def _trend_value(s: Summary, sign: int) -> float | None:
    """Change in the direction `sign` (1 falls, -1 rises) less two standard errors; None if it goes the other way."""
    if s.trend is None or sign * s.trend.fall < 0:
        return None
    return sign * s.trend.fall - 2 * s.trend.standard_error


def _trend_sentence(s: Summary, c: RunConfig) -> str:
    assert s.trend is not None
    return (
        f"Over the last fifth of the logged training ({number(s.trend.rows)} rows) the batch FVU's fitted line "
        f"{'fell' if s.trend.fall >= 0 else 'rose'} by {percent(abs(s.trend.fall))} of its mean, with a standard error "
        f"of {percent(s.trend.standard_error)}."
    )


def _few_sentence(s: Summary, c: RunConfig) -> str:
    return (
        f"{percent(s.few_samples_fraction)} of the features that fired have fewer than the "
        f"{number(c.analysis.max_per_feature)} samples that are kept; a feature with samples has "
        f"{number(s.average_samples)} on average."
    )


RULES = (
    Rule(
        "nested prefixes", "smallest fall in FVU by a further prefix < 0.01", "<", 0.01,
        _smallest_gain, _prefix_sentence,
        "transcoder.group_sizes", "Merge or resize the groups: one of them adds little",
    ),
    Rule(
        "reconstruction", "held-out FVU of the full dictionary > 0.5", ">", 0.5,
        lambda s, c: s.fvu[-1],
        lambda s, c: f"The full dictionary leaves {percent(s.fvu[-1])} of the held-out variance unexplained.",
        "transcoder.k", "Allow more active features, train longer or enlarge the dictionary",
    ),
    Rule(
        "sparsity", "|L0 / k - 1| > 5 %", ">", 0.05,
        lambda s, c: abs(s.l0 / s.k - 1),
        lambda s, c: f"Held-out L0 is {number(s.l0)} where k = {number(s.k)} was asked, {percent(s.l0 / s.k - 1)} off.",
        "transcoder.calibration_tokens", "Calibrate the threshold on more tokens",
    ),
    Rule(
        "dead features", "features silent on the held-out tokens > 5 %", ">", 0.05,
        lambda s, c: s.silent_fraction, _dead_sentence,
        "transcoder.aux_coefficient", "Raise the weight of the loss that revives dead features",
    ),
    Rule(
        "dead counter", "trained tokens / dead_after_tokens < 1", "<", 1,
        lambda s, c: s.trained_tokens / c.transcoder.dead_after_tokens,
        lambda s, c: f"Training saw {number(s.trained_tokens)} tokens; a feature counts as dead after "
        f"{number(c.transcoder.dead_after_tokens)}, so with fewer trained tokens none can and AuxK never acts.",
        "transcoder.dead_after_tokens", "Lower it below the length of training",
    ),
    Rule(
        "dense features", "features that fire on more than 10 % of tokens > 1 %", ">", 0.01,
        lambda s, c: s.dense_fraction, _dense_sentence,
        "transcoder.k", "Use fewer active features or a larger dictionary",
    ),
    Rule(
        "loss recovered", "loss recovered against zero ablation < 90 %", "<", 0.9,
        lambda s, c: s.loss.recovered_zero[-1] if s.loss else None, _loss_sentence,
        "data.num_tokens", "Train on more tokens, or allow more active features",
    ),
    Rule(
        "loss measured", "tokens with the transcoder spliced in < 1", "<", 1,
        lambda s, c: float(s.loss.tokens if s.loss else 0),
        lambda s, c: f"The language model's loss was measured on {number(s.loss.tokens if s.loss else 0)} tokens.",
        "analysis.loss_tokens", "Set it to see what the reconstruction costs the language model",
    ),
    Rule(
        "still improving", "fall of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda s, c: _trend_value(s, 1), _trend_sentence,
        "data.num_tokens", "Train longer",
    ),
    Rule(
        "getting worse", "rise of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda s, c: _trend_value(s, -1), _trend_sentence,
        "optimizer.lr", "Lower the learning rate",
    ),
    Rule(
        "few samples", "features that fired with fewer than max_per_feature samples > 50 %", ">", 0.5,
        lambda s, c: s.few_samples_fraction, _few_sentence,
        "analysis.num_tokens", "Analyse more tokens",
    ),
    Rule(
        "held-out text", "analysed tokens / analysis.num_tokens < 95 %", "<", 0.95,
        lambda s, c: s.analysed_tokens / c.analysis.num_tokens,
        lambda s, c: f"{number(s.analysed_tokens)} held-out tokens were analysed; "
        f"{number(c.analysis.num_tokens)} were asked for.",
        "data.heldout_fraction", "Hold out more text, or add documents",
    ),
)  # fmt: skip
