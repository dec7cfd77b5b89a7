"""Insights and recommendations: a table of rules, each a measured value held against a threshold.

Every measurable rule gives one insight, met or not, with its number; a rule that is met also gives a recommendation
that names the configuration field to change. A rule whose value was not measured says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mtc.report.format import number, numbers, percent

if TYPE_CHECKING:
    from mtc.analysis import Summary
    from mtc.config import RunConfig


class Finding(BaseModel):
    """What a rule says about this run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")

    rule: str
    """Name of the rule."""
    condition: str
    """The rule in words, threshold included."""
    value: float
    """The measured number that is held against the threshold."""
    threshold: float
    """The rule's limit, in the unit of `value`."""
    met: bool
    """Whether the condition holds."""
    text: str
    """What was measured; in a recommendation, what to change."""
    field: str | None = None
    """Configuration field to change; only in recommendations."""


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
        f"features {number(m)} to {number(n)} change it by {number(b - a)} to {number(b)}"
        for (m, n), (a, b) in zip(pairwise(s.prefixes), pairwise(s.fvu), strict=True)
    ]
    return f"Held-out FVU of the first {number(s.prefixes[0])} features is {number(s.fvu[0])}; {'; '.join(steps)}."


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


def _trend_sentence(s: Summary, c: RunConfig) -> str:
    assert s.trend is not None
    return (
        f"Over the last fifth of the logged training ({number(s.trend.rows)} rows) the batch FVU's fitted line fell by "
        f"{percent(s.trend.fall)} of its mean, with a standard error of {percent(s.trend.standard_error)} (a negative "
        "fall is a rise)."
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
        lambda s, c: f"Training saw {number(s.trained_tokens)} tokens, and a feature counts as dead after "
        f"{number(c.transcoder.dead_after_tokens)}; with fewer trained tokens none can, and AuxK never acts.",
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
        lambda s, c: s.trend.fall - 2 * s.trend.standard_error if s.trend else None, _trend_sentence,
        "data.num_tokens", "Train longer",
    ),
    Rule(
        "getting worse", "rise of batch FVU over the last fifth of training, less two standard errors, > 1 %",
        ">", 0.01,
        lambda s, c: -s.trend.fall - 2 * s.trend.standard_error if s.trend else None, _trend_sentence,
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
