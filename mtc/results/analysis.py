"""The shape of a run's analysis: every figure of the report, with its unit.

Terms. A *sample* of a feature is one of its stored top examples (`kind == "top"`, at most one per window); examples
drawn uniformly are counted apart. A feature is *silent* if it did not fire on the analysed held-out tokens, and *dead*
if the training counter says that it had not fired for `transcoder.dead_after_tokens` when training ended.
"""

from __future__ import annotations

from mtc.config import RunConfig
from mtc.record import Record
from mtc.results.evaluation import Evaluation, LossRecovered
from mtc.results.features import Histogram, ShownFeature, TopFeature, Weights
from mtc.results.intervals import Intervals
from mtc.results.nesting import PrefixStep, Tree
from mtc.results.probing import Probing, Spelling
from mtc.results.run import File, RunFacts, Training, Trend

FORMAT_VERSION = 2


class Summary(Record):
    """The run in figures."""

    total_features: int
    """Size of the dictionary."""
    trained_tokens: int
    """Tokens trained on."""
    analysed_tokens: int
    """Held-out tokens on which examples, counts and densities were collected."""
    silent_features: int
    """Features that did not fire on the analysed held-out tokens."""
    silent_fraction: float
    """Their share of all features."""
    dead_features: int | None
    """Features whose training counter reached transcoder.dead_after_tokens; None if the training is not known."""
    dead_fraction: float | None
    """Their share of all features."""
    features_with_samples: int
    """Features with at least one sample."""
    total_samples: int
    """Samples of all features."""
    average_samples: float
    """Samples per feature, over features with samples; 0 without any."""
    uniform_examples: int
    """Examples drawn uniformly, whatever their size, of all features."""
    few_samples_fraction: float | None
    """Share of the features that fired which have fewer samples than analysis.max_per_feature; None if none fired."""
    dense_features: int
    """Features that fire on more than 10 % of the analysed tokens."""
    dense_fraction: float
    """Their share of all features."""
    dense_activation_share: float
    """Share of all activations (counted, not summed) that are theirs."""
    evaluated_tokens: int
    """Held-out tokens on which FVU and L0 were measured."""
    documents: int
    """Documents that they are of: intervals come from resampling these."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries."""
    fvu: tuple[float, ...]
    """Held-out fraction of variance unexplained, per prefix."""
    fvu_interval: Intervals | None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    explained_variance: tuple[float, ...]
    """1 - FVU, per prefix."""
    cosine: tuple[float, ...]
    """Mean cosine between target and reconstruction, per prefix."""
    l0: float
    """Active features per held-out token, full dictionary."""
    k: int
    """Active features per token that were asked for."""
    loss: LossRecovered | None
    """The language model with the transcoder in the MLP's place; None if it was not measured."""
    trend: Trend | None
    """Training at its end; None with too few logged steps to fit a line."""


class Finding(Record):
    """What a rule says about this run."""

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


class Analysis(Record):
    """Everything that the report says."""

    format_version: int = FORMAT_VERSION
    """Layout of this file; readers refuse one they do not know."""
    summary: Summary
    """Section 1: the run in figures."""
    config: RunConfig
    """Section 2: the configuration,"""
    training: Training
    """what follows from it,"""
    facts: RunFacts
    """and what happened."""
    evaluation: Evaluation
    """Section 3: held-out metrics as they were measured."""
    weights: Weights
    """Section 4: the trained matrices."""
    density: Histogram
    """log10 of the share of tokens on which features fire; silent features are left out."""
    activation_edges: tuple[float, ...]
    """Borders of the bins of Feature.histogram; the outer bins take what lies beyond."""
    top_features: tuple[TopFeature, ...]
    """Section 5: the strongest features that fired."""
    features: tuple[ShownFeature, ...]
    """Section 6: the features that are shown in full; features.parquet has all."""
    prefix_steps: tuple[PrefixStep, ...]
    """Section 7: what each group adds,"""
    tree: Tree | None
    """and the nested tree; None with a single group, or if no tokens were sampled."""
    probing: Probing | None
    """Section 8: what linear probes read from the features; None if it was not asked for."""
    spelling: Spelling | None
    """Whether the model can spell, and absorption on first letters; None if it was not asked for."""
    insights: tuple[Finding, ...]
    """Section 9: every rule that could be measured."""
    recommendations: tuple[Finding, ...]
    """Section 10: the rules that are met."""
    files: tuple[File, ...]
    """Section 11: files generated."""
