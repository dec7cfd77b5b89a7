"""Labels of features by a language model and what they are worth; docs/labels.md says how that is measured."""

from __future__ import annotations

from typing import Literal

from mtc.record import Record
from mtc.results.intervals import Interval

LabelKind = Literal["model", "machine"]
"""Who made a label: a language model, or the rules of mtc.analysis.naming."""
LabelTest = Literal["detection", "fuzzing", "simulation"]


class LabelScore(Record):
    """How well one feature's label did in one test."""

    labels: LabelKind
    """Who made the label."""
    test: LabelTest
    """What the judge was asked. `detection`: in which contexts the feature is active; `fuzzing`: in which of them the
    marked tokens are those on which it is; `simulation`: how strongly it is active on each token."""
    score: Interval
    """Balanced accuracy of the judge's answers, from 0 to 1, 0.5 by chance, with its 95 % interval (of the shares of
    right answers Wilson's, put together by MOVER); of simulation the correlation between what it said and the
    activations, from -1 to 1, with the interval of Fisher's transformation."""
    said_yes: float | None
    """Share of the contexts that the judge said yes to, from 0 to 1; None of simulation."""
    contexts: int
    """Contexts with an answer that could be used; of simulation tokens."""


class FeatureLabel(Record):
    """What is known of one feature's label: a row of labels.parquet."""

    feature: int
    """Index of the feature in the dictionary."""
    label: str | None
    """The language model's label; None if it gave none that could be used."""
    reason: str | None
    """Why there is none, such as `refused`; None where there is one, and where the model was not asked."""
    machine_label: str | None
    """The label that rules make of the feature's examples; None without examples."""
    first_label: str | None
    """What the model said before it was shown the labels of the feature's children; None if it was asked once."""
    model: str
    """Name of the language model."""
    prompts: str
    """Version of the prompts: it changes whenever one of them does."""
    time: str | None
    """When the label was given, ISO 8601, UTC; None without."""
    prompt_tokens: int
    """Tokens of all prompts about the feature, the judge's too."""
    answer_tokens: int
    """Tokens of all answers about it."""
    scores: tuple[LabelScore, ...]
    """Scores of its labels; none if it was not scored."""
    not_scored: str | None
    """Why it has no scores though it was to be scored; None otherwise."""


class ScoreSummary(Record):
    """Scores of all scored features' labels of one kind in one test."""

    labels: LabelKind
    """Who made the labels."""
    test: LabelTest
    """What the judge was asked; see LabelScore."""
    features: int
    """Features with a score."""
    mean: Interval
    """Mean of the features' scores, with the interval of bootstrap resamples of features."""
    said_yes: float | None
    """Mean share of the contexts that the judge said yes to, from 0 to 1: half are active, so that one who always says
    yes is seen here; None of simulation."""


class YesShare(Record):
    """How often the judge called contexts of one kind active."""

    labels: LabelKind
    """Who made the labels that it went by."""
    part: str
    """Kind of context: `random` and `near miss` are silent, `1` to `5` are fifths of the feature's activations, the
    weakest first."""
    share: Interval
    """Share of yes, from 0 to 1, with Wilson's interval."""
    contexts: int
    """Contexts of all features that were asked about."""


class Difference(Record):
    """What the language model's labels add to those of rules, on features that have both."""

    test: LabelTest
    """What the judge was asked; see LabelScore."""
    features: int
    """Features with a score of both kinds."""
    mean: Interval
    """Mean of the model's score less that of rules, with the interval of bootstrap resamples of features."""


class Labelling(Record):
    """Labels of a dictionary by a language model, in sum."""

    model: str
    """Name of the language model that explained."""
    judge: str
    """Name of the language model that judged."""
    prompts: str
    """Version of the prompts."""
    seed: int
    """Seed by which contexts were drawn."""
    features: int
    """Features that the model was to label: those with examples."""
    labelled: int
    """Features that have its label."""
    revised: int
    """Features that were asked about a second time, with the labels of their children."""
    finished: bool
    """Whether all was asked that was to be; it was not where a limit on tokens was reached."""
    failures: dict[str, int]
    """Answers that could not be used, of all questions, by reason."""
    requests: int
    """Questions that were answered, in this job and in earlier ones that it went on from."""
    prompt_tokens: int
    """Tokens of their prompts, as the endpoint counted them."""
    answer_tokens: int
    """Tokens of their answers."""
    scored: int
    """Features whose labels were scored."""
    not_scored: dict[str, int]
    """Features that were to be scored and could not be, by reason."""
    scores: tuple[ScoreSummary, ...]
    """Scores by kind of label and test."""
    differences: tuple[Difference, ...]
    """What the model adds to rules, by test."""
    yes: tuple[YesShare, ...]
    """How often the judge said yes in detection, by who made the label and how active the feature is."""
    shown: tuple[FeatureLabel, ...]
    """Labels of the features that the report shows in full; labels.parquet has all."""
    analysed: str
    """`facts.analysed` of the analysis whose examples were used; another one's are other examples."""
