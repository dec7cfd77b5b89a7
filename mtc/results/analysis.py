"""The shape of a run's analysis: every figure of the report, with its unit.

Terms. A *sample* of a feature is one of its stored top examples (`kind == "top"`, at most one per window); examples
drawn uniformly are counted apart. A feature is *silent* if it did not fire on the analysed held-out tokens, and *dead*
if the training counter says that it had not fired for `transcoder.dead_after_tokens` when training ended. FVU, cosine
and L0 are *headline* figures, without massive tokens, unless they are said to be of all tokens; a feature is *of
massive tokens* if more than half of its summed activation falls on them.
"""

from __future__ import annotations

from mtc.config import RunConfig
from mtc.record import Record
from mtc.results.copies import Copies
from mtc.results.evaluation import AllTokens, Evaluation, LossRecovered, Massive, StraightLine
from mtc.results.features import Histogram, ShownFeature, TopFeature, Weights
from mtc.results.intervals import Intervals
from mtc.results.labels import Labelling
from mtc.results.nesting import PrefixStep, Tree
from mtc.results.probing import Probing, Spelling
from mtc.results.run import File, RunFacts, Training, TrainingFit, Trend

FORMAT_VERSION = 4


class Summary(Record):
    """The run's key figures, from training and from held-out text."""

    total_features: int
    """Features of the whole dictionary."""
    trained_tokens: int
    """Tokens trained on."""
    analysed_tokens: int
    """Held-out tokens on which examples, counts and densities were collected."""
    silent_features: int
    """Features that did not fire on the analysed held-out tokens."""
    silent_fraction: float
    """Share of all features that did not fire on the analysed held-out tokens, from 0 to 1."""
    dead_features: int | None
    """Features whose training counter reached transcoder.dead_after_tokens; None if the training is not known."""
    dead_fraction: float | None
    """Share of all features that are dead by the training counter, from 0 to 1; None if the training is not known."""
    features_with_samples: int
    """Features with at least one stored top example."""
    total_samples: int
    """Stored top examples of all features."""
    average_samples: float
    """Stored top examples per feature, over the features that have any; 0 if none has."""
    uniform_examples: int
    """Stored examples of all features that were drawn uniformly from their activations."""
    few_samples_fraction: float | None
    """Share of the features that fired which have fewer top examples than analysis.max_per_feature, from 0 to 1; None
    if none fired."""
    dense_features: int
    """Features that fire on more than 10 % of the analysed tokens."""
    dense_fraction: float
    """Share of all features that fire on more than 10 % of the analysed tokens, from 0 to 1."""
    dense_activation_share: float
    """Share of all activations (counted, not summed) that belong to dense features, from 0 to 1."""
    evaluated_tokens: int
    """Held-out tokens on which FVU and L0 were measured, massive ones included."""
    documents: int
    """Documents of the tokens on which FVU and L0 were measured; their intervals come from resampling documents."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries in features, ascending."""
    fvu: tuple[float, ...]
    """Held-out fraction of variance unexplained, per prefix, without massive tokens."""
    fvu_interval: Intervals | None
    """95 % interval of `fvu`, from resampled documents; None with too few of them."""
    explained_variance: tuple[float, ...]
    """Held-out share of the targets' variance that is explained, 1 - FVU, per prefix, without massive tokens."""
    cosine: tuple[float, ...]
    """Mean cosine between target and reconstruction over held-out tokens, per prefix, without massive tokens."""
    l0: float
    """Active features of the whole dictionary per held-out token, mean, without massive tokens."""
    all_tokens: AllTokens
    """FVU, cosine and L0 of all held-out tokens, massive ones included."""
    massive: Massive
    """Which held-out tokens are massive, and what they hold."""
    massive_features: int
    """Features of massive tokens: more than half of their summed activation falls on these."""
    line: StraightLine | None
    """How well the least-squares affine map does on the same tokens; None with too few tokens to fit it."""
    training_fit: TrainingFit | None
    """FVU on the tokens that were trained on, beside the held-out one; None if no training is known."""
    k: int
    """Active features per token that the configuration asks for."""
    loss: LossRecovered | None
    """Next-token loss of the language model with the transcoder in its MLP's place; None if it was not measured."""
    trend: Trend | None
    """How the batch FVU moved at the end of training; None with too few logged steps to fit a line."""


class Finding(Record):
    """What a rule says about this run."""

    rule: str
    """Name of the rule."""
    condition: str
    """Condition of the rule in words, threshold included."""
    value: float
    """Number that was measured and is held against the rule's threshold."""
    threshold: float
    """The rule's limit, in the unit of `value`."""
    met: bool
    """Whether the rule's condition holds for this run."""
    text: str
    """Sentence that tells what was measured; in a recommendation, what to change."""
    field: str | None = None
    """Configuration field that a recommendation says to change; None in an insight."""


class Headline(Record):
    """What reports of several transcoders say of one of them."""

    format_version: int = FORMAT_VERSION
    """Version of the layout of analysis.json; readers refuse one they do not know."""
    summary: Summary
    """Key figures of the run (section 1)."""
    config: RunConfig
    """Configuration that the transcoder was trained with (section 2)."""
    training: Training
    """Scales, threshold and sizes that training derived from the configuration (section 2)."""
    facts: RunFacts
    """What happened during the run: counts, timing, hardware, events (section 2)."""


class Analysis(Headline):
    """All figures of one transcoder's report."""

    evaluation: Evaluation
    """Metrics on held-out text at the calibrated threshold (section 3)."""
    weights: Weights
    """Distributions of the trained matrices' entries and norms (section 4)."""
    density: Histogram
    """Features by log10 of the share of tokens on which they fire, silent features left out (section 3)."""
    activation_edges: tuple[float, ...]
    """Borders of the bins of Feature.histogram, in scaled units; the outer bins take what lies beyond."""
    top_features: tuple[TopFeature, ...]
    """Strongest features that fired, by maximum activation, those of massive tokens left out (section 5)."""
    massive_features: tuple[TopFeature, ...]
    """Strongest features of massive tokens, by maximum activation (section 5)."""
    massive_indices: tuple[int, ...]
    """Indices of all features of massive tokens."""
    copies: Copies | None
    """Features that are copies of others (section 5); None if no tokens were sampled."""
    features: tuple[ShownFeature, ...]
    """Features that the report shows in full (section 6); features.parquet has all of them."""
    prefix_steps: tuple[PrefixStep, ...]
    """What each group of features adds to the groups before it (section 7)."""
    tree: Tree | None
    """Parents, children, splitting and absorption in the nested dictionary (section 7); None with a single group, or if
    no tokens were sampled."""
    probing: Probing | None
    """What linear probes read from the features (section 8); None if it was not asked for."""
    spelling: Spelling | None
    """Whether the language model can spell, and absorption on first letters (section 8); None if it was not asked
    for."""
    labelling: Labelling | None
    """Labels by a language model and their scores (section 9); None if they were not asked for."""
    insights: tuple[Finding, ...]
    """Every rule that could be measured, met or not (section 10)."""
    recommendations: tuple[Finding, ...]
    """Rules that are met, with what to change (section 11)."""
    files: tuple[File, ...]
    """Files of the run and of its report (section 12)."""

    def headline(self) -> Headline:
        """The part that reports of several transcoders need, which is small."""
        return Headline(**{name: getattr(self, name) for name in Headline.model_fields})
