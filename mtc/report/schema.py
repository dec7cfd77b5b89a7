"""The shape of a run's analysis: every figure of the report, with its unit.

Terms. A *sample* of a feature is one of its stored top examples (`kind == "top"`, at most one per window); examples
drawn uniformly are counted apart. A feature is *silent* if it did not fire on the analysed held-out tokens, and *dead*
if the training counter says that it had not fired for `transcoder.dead_after_tokens` when training ended.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from mtc.bootstrap import Intervals
from mtc.config import RunConfig
from mtc.evaluation import Evaluation, LossRecovered
from mtc.probing import Probing
from mtc.spelling import Spelling
from mtc.timing import StreamTiming

FORMAT_VERSION = 2

RUN_FILES = {
    "config.yaml": "the configuration that reproduces the run",
    "transcoder.safetensors": "weights, scales and the inference threshold",
    "metrics.jsonl": "training history, one line per logged step",
    "features.parquet": "every figure of every feature, one row each",
    "examples.parquet": "activating examples of every feature, ordered by feature",
    "analysis.json": "every figure of this report",
    "manifest.json": "sizes and sha256 of all files",
}


def _as_dict(part: BaseModel | None) -> dict[str, Any] | None:
    return None if part is None else part.model_dump()


# Models of other modules keep their own JSON settings; as dicts they follow `_Part`'s.
_AsDict = PlainSerializer(_as_dict, when_used="json")


class _Part(BaseModel):
    # JSON has no NaN; as strings they are readable by any parser and come back as floats.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


class RunFacts(_Part):
    """What happened in the run that neither the configuration nor the weights tell."""

    run_id: str
    """Name of the run."""
    steps: int
    """Training steps done."""
    trained_tokens: int
    """Tokens trained on, repeats included."""
    dropped_tokens: int = 0
    """Tokens whose activations were not finite, never trained on."""
    calibration_tokens: int = 0
    """Fresh tokens that the threshold was calibrated on."""
    precision: str = "float32"
    """Arithmetic of the transcoder's products; weights, loss and optimizer are float32. With the sparse backend, of the
    search for active features only."""
    compute: str = ""
    """How the training loss was computed, and how long the alternatives took."""
    token_store: str = ""
    """URL of the tokenised text."""
    data_name: str
    """The text, as it was found."""
    documents: dict[str, int] = {}
    """Documents per split."""
    windows: dict[str, int] = {}
    """Windows per split."""
    skipped_documents: dict[str, int] = {}
    """Documents that could not be used, by reason."""
    skipped_examples: tuple[str, ...] = ()
    """The first few of them: reason and name."""
    language_model_dtype: str
    """Arithmetic of the language model."""
    language_model_compute: tuple[str, ...] = ()
    """How its passes ran, in the processes of the analysis: compiled, or eager and why."""
    devices: tuple[str, ...]
    """Kinds of device that were used."""
    num_trainers: int
    """Data-parallel trainer processes."""
    num_model_actors: int
    """Processes that held the language model."""
    seconds: dict[str, float] = {}
    """Wall time per stage (tokenise, train, analyse), seconds."""
    timing: Annotated[StreamTiming | None, _AsDict] = None
    """What waited on what during training, since the run's last start; None if it was not measured."""
    other_layers: tuple[int, ...] = ()
    """Layers whose transcoders were trained from the same forward passes."""
    events: tuple[dict[str, Any], ...] = ()
    """What happened, in order: at least `time` (ISO 8601), `kind` and `message`, and `step` where there is one."""
    versions: dict[str, str] = {}
    """Versions of the packages that matter."""
    data_fingerprint: str = ""
    """Of the token store: text, tokenizer and window settings."""
    git_revision: str | None = None
    """Commit of the code that wrote the report, with `-dirty` behind it if files differed; None if it is not known."""
    hardware: tuple[str, ...] = ()
    """Kinds of nodes: processor, CPUs, memory, GPUs."""
    analysed: str = ""
    """When the analysis was made, ISO 8601, UTC."""
    files: tuple[str, ...] = tuple(RUN_FILES)
    """Files of the run, the report's own left out."""


class Distribution(_Part):
    """Of a set of float32 numbers, computed in float64."""

    mean: float
    """Mean."""
    std: float
    """Population standard deviation."""
    min: float
    """Smallest."""
    max: float
    """Largest."""


class Histogram(_Part):
    """Counts of features between borders, by group."""

    edges: tuple[float, ...]
    """Borders of the bins, ascending, one more than there are bins."""
    counts: tuple[tuple[int, ...], ...]
    """[groups][bins]."""


class Group(_Part):
    """The features that one nested prefix adds."""

    group: int
    """Index from 0."""
    first: int
    """First feature."""
    end: int
    """One past the last feature: the prefix that this group completes."""
    silent_features: int
    """Features that did not fire on the analysed tokens."""
    mean_density: float
    """Mean over features of the share of tokens on which they fire."""
    decoder_norm: float
    """Mean Euclidean norm of the decoder rows, in scaled target units."""
    alignment: float | None
    """Mean cosine between a feature's encoder and decoder row; None if source and target differ in width."""


class Weights(_Part):
    """The trained matrices."""

    encoder: Distribution
    """Entries of W_enc [features, d_source]."""
    decoder: Distribution
    """Entries of W_dec [features, d_target]."""
    encoder_norm: Distribution
    """Euclidean norms of W_enc's rows."""
    decoder_norm: Distribution
    """Euclidean norms of W_dec's rows, in scaled target units."""
    alignment: Distribution | None
    """Cosines between encoder and decoder rows; None if source and target differ in width."""
    groups: tuple[Group, ...]
    """Per group of the nested dictionary."""


class Training(_Part):
    """What the configuration leaves open or derives."""

    d_source: int
    """Width of the source site."""
    d_target: int
    """Width of the target site."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries."""
    input_norm: str
    """How sources are scaled."""
    input_scale: float
    """Factor on sources; 1 unless input_norm is `scalar`."""
    target_scale: float
    """Factor on targets."""
    threshold: float
    """Pre-activation above which a feature is active at inference; the mean if each feature has its own."""
    planned_steps: int
    """Steps that the configuration asks for."""
    fingerprint: str
    """Changes with every setting that changes the run's numbers."""


class Trend(_Part):
    """A line fitted to the full dictionary's batch FVU over the last fifth of the logged steps."""

    rows: int
    """Logged steps that were fitted."""
    fall: float
    """How far the line falls from the first to the last of them, as a share of its mean; negative if it rises."""
    standard_error: float
    """Standard error of `fall`, from the residuals."""


class Summary(_Part):
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
    loss: Annotated[LossRecovered | None, _AsDict]
    """The language model with the transcoder in the MLP's place; None if it was not measured."""
    trend: Trend | None
    """Training at its end; None with too few logged steps to fit a line."""


class TokenCount(_Part):
    """A token at the peaks of a feature's samples."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    count: int
    """Samples of the feature that peak on it."""


class LogitEffect(_Part):
    """What one unit of a feature's activation adds to a token's logit on the direct way out."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    value: float
    """Logits per unit of activation, less the mean over the vocabulary."""


class Neighbour(_Part):
    """Another feature whose decoder row is near."""

    feature: int
    """Index in the dictionary."""
    cosine: float
    """Between the two decoder rows."""


class Parent(_Part):
    """The earlier feature that a feature refines."""

    feature: int
    """Index in the dictionary."""
    cosine: float
    """Between the two decoder rows."""
    coactivation: float
    """P(parent fires | this feature fires) on the sampled tokens."""
    base_rate: float
    """P(parent fires) on the sampled tokens."""


class Feature(_Part):
    """One feature on the analysed held-out tokens: a row of features.parquet."""

    feature: int
    """Index in the dictionary."""
    group: int
    """Group of the nested dictionary, from 0."""
    max_activation: float
    """Strongest activation, in scaled units; 0 if it never fired."""
    mean_activation: float
    """Mean over the tokens on which it fired; 0 if it never fired."""
    count: int
    """Tokens on which it fired."""
    density: float
    """Share of tokens on which it fired."""
    samples: int
    """Stored top examples."""
    tokens_since_fired: int | None
    """Training tokens since it last fired, when training ended; None if the training is not known."""
    decoder_norm: float
    """Euclidean norm of its decoder row, in scaled target units."""
    alignment: float | None
    """Cosine between its encoder and decoder row; None if source and target differ in width."""
    histogram: tuple[int, ...]
    """Activations by size: counts between the borders `Analysis.activation_edges`."""
    top_tokens: tuple[TokenCount, ...]
    """Up to ten most frequent peak tokens of its samples; equal counts in order of strength."""
    positive_logits: tuple[LogitEffect, ...] | None
    """The ten tokens whose logits it raises most; None if it was not measured."""
    negative_logits: tuple[LogitEffect, ...] | None
    """The ten whose logits it lowers most."""
    neighbours: tuple[Neighbour, ...]
    """Up to five nearest features by decoder cosine."""
    parent: Parent | None
    """Of a nested dictionary's later groups; None without one, or if it fired too rarely to tell."""
    children: tuple[int, ...]
    """Features whose parent it is."""


class Example(_Part):
    """A place in the held-out text where a feature fires."""

    kind: Literal["top", "sample"]
    """One of the strongest, or drawn uniformly."""
    activation: float
    """At the peak, in scaled units."""
    quantile: float | None
    """Share of the uniformly drawn activations that are weaker; None for the strongest."""
    document_id: str
    """The document."""
    tokens: tuple[str, ...]
    """Decoded tokens around the peak."""
    activations: tuple[float, ...]
    """The feature's activation on each of them."""
    peak: int
    """Index of the peak among them."""


class ShownFeature(_Part):
    """A feature that the report shows in full."""

    reason: Literal["strongest", "drawn"]
    """Why it is shown: among the strongest, or drawn at random from its group's features that fired."""
    figures: Feature
    """Its row of features.parquet."""
    examples: tuple[Example, ...]
    """Contexts: the strongest, then one of each fifth of the uniformly drawn activations, strongest fifth first."""


class TokenGain(_Part):
    """A token that is reconstructed better with a group of features than without."""

    token_id: int
    """Id in the language model's vocabulary."""
    token: str
    """Decoded."""
    count: int
    """How often it occurs in the evaluated text."""
    before: float
    """Mean squared error without the group, over the mean squared deviation of all targets."""
    after: float
    """The same with it."""


class PrefixStep(_Part):
    """What a group of features adds to those before it."""

    group: int
    """Index from 0."""
    prefix: int
    """Features up to and with this group."""
    fvu_before: float
    """FVU without the group; for the first group 1, that of the mean."""
    fvu_after: float
    """FVU with it."""
    recovered_before: float | None
    """Loss recovered against zero ablation without the group; None for the first group and if it was not measured."""
    recovered_after: float | None
    """The same with it."""
    tokens: tuple[TokenGain, ...]
    """Of the tokens that occur at least `min_count` times, those whose error falls most."""
    min_count: int
    """Least occurrences of a token in `tokens`."""


class SplitFeature(_Part):
    """A feature that several later ones divide among themselves; see mtc.nesting."""

    feature: int
    """The parent."""
    top_token: str | None
    """Its most frequent peak token."""
    children: tuple[int, ...]
    """Features whose parent it is."""
    child_tokens: tuple[str | None, ...]
    """Their most frequent peak tokens."""
    fired: int
    """Sampled tokens on which the parent fires."""
    coverage: float
    """Share of these on which a child fires."""
    overlap: float
    """Share of those on which two or more children fire."""


class AbsorbedFeature(_Part):
    """An earlier feature that is silent where a later one fires, though it should fire; see mtc.nesting."""

    parent: int
    """The earlier feature."""
    parent_token: str | None
    """Its most frequent peak token."""
    child: int
    """The later one."""
    child_token: str | None
    """Its most frequent peak token."""
    cosine: float
    """Between the two decoder rows."""
    expected: int
    """Sampled tokens on which the child fires and the parent should."""
    absorbed: int
    """Of these, tokens on which the parent is silent."""


class Child(_Part):
    """A branch of the tree."""

    feature: int
    """The later feature."""
    group: int
    """Its group."""
    top_token: str | None
    """Its most frequent peak token."""
    cosine: float
    """Between its decoder row and its parent's."""
    coactivation: float
    """P(parent fires | it fires)."""
    base_rate: float
    """P(parent fires)."""


class Family(_Part):
    """A parent and its children in the nested tree."""

    feature: int
    """The parent."""
    group: int
    """Its group."""
    top_token: str | None
    """Its most frequent peak token."""
    num_children: int
    """How many features have it as their parent."""
    children: tuple[Child, ...]
    """Some of them, the strongest bonds (cosine times co-activation) first."""


class Tree(_Part):
    """The nested dictionary as a tree, on a sample of the held-out tokens; see mtc.nesting for how it is found."""

    tokens: int
    """Sampled tokens."""
    with_parent: tuple[int, ...]
    """Features of each group that have a parent; 0 for the first."""
    judged: tuple[int, ...]
    """Features of each group that fired often enough to tell."""
    families: tuple[Family, ...]
    """The parents with most children."""
    splits: tuple[SplitFeature, ...]
    """Splitting candidates, those with most tokens first."""
    num_splits: int
    """How many there are in all."""
    absorptions: tuple[AbsorbedFeature, ...]
    """Absorption candidates, those with most absorbed tokens first."""
    num_absorptions: int
    """How many there are in all."""
    tested_pairs: int
    """Pairs for which absorption could be looked at."""
    limits: dict[str, float]
    """The thresholds of mtc.nesting by name."""


class TopFeature(_Part):
    """A row of the table of strongest features."""

    rank: int
    """From 1, by maximum activation."""
    feature: int
    """Index in the dictionary."""
    group: int
    """Group of the nested dictionary, from 0."""
    max_activation: float
    """Strongest activation, in scaled units."""
    samples: int
    """Stored top examples."""
    top_token: str | None
    """Most frequent peak token, decoded; None without samples."""


class File(_Part):
    """A file of the run."""

    name: str
    """Path inside the run directory, or inside its report directory."""
    description: str
    """What it holds."""


class Finding(_Part):
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


class Analysis(_Part):
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
    evaluation: Annotated[Evaluation, _AsDict]
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
