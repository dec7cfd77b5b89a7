"""The shape of a run's analysis: every figure of the report, with its unit.

Terms. A *sample* of a feature is one of its stored top examples (`kind == "top"`, at most one per window); examples
drawn uniformly are counted apart. A feature is *silent* if it did not fire on the analysed held-out tokens, and *dead*
if the training counter says that it had not fired for `transcoder.dead_after_tokens` when training ended.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

from mtc.config import RunConfig
from mtc.evaluation import Evaluation, LossRecovered
from mtc.timing import StreamTiming

FORMAT_VERSION = 1

RUN_FILES = {
    "config.yaml": "the configuration that reproduces the run",
    "transcoder.safetensors": "weights, scales and the inference threshold",
    "metrics.jsonl": "training history, one line per logged step",
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
    dead_features: int
    """Features whose training counter reached transcoder.dead_after_tokens."""
    dead_fraction: float
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
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries."""
    fvu: tuple[float, ...]
    """Held-out fraction of variance unexplained, per prefix."""
    explained_variance: tuple[float, ...]
    """1 - FVU, per prefix."""
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


class Feature(_Part):
    """One feature on the analysed held-out tokens."""

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
    tokens_since_fired: int
    """Training tokens since it last fired, when training ended."""
    decoder_norm: float
    """Euclidean norm of its decoder row, in scaled target units."""
    top_tokens: tuple[TokenCount, ...]
    """Up to ten most frequent peak tokens of its samples; equal counts in order of strength."""


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
    """Held-out metrics as they were measured."""
    weights: Weights
    """Section 3: the trained matrices."""
    top_features: tuple[TopFeature, ...]
    """Section 4: the strongest features that fired."""
    features: tuple[Feature, ...]
    """Section 5: all features, by index."""
    insights: tuple[Finding, ...]
    """Section 6: every rule that could be measured."""
    recommendations: tuple[Finding, ...]
    """Section 7: the rules that are met."""
    files: tuple[File, ...]
    """Section 8: files generated."""
