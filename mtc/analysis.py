"""Analysis: every figure of a run's report, computed once from the final weights and the held-out pass.

Terms. A *sample* of a feature is one of its stored top examples (`kind == "top"`, at most one per window); examples
drawn uniformly are counted apart. A feature is *silent* if it did not fire on the analysed held-out tokens, and *dead*
if the training counter says that it had not fired for `transcoder.dead_after_tokens` when training ended.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mtc.config import RunConfig
from mtc.evaluation import Evaluation, LossRecovered
from mtc.examples import FeatureStatistics
from mtc.report import report_names
from mtc.report.rules import Finding, judge
from mtc.transcoder import MatryoshkaTranscoder

FORMAT_VERSION = 1
DENSE = 0.1
"""A feature that fires on a larger share of the tokens is called dense."""
TOP_TOKENS = 10
MIN_TREND_ROWS = 5

_RUN_FILES = {
    "config.yaml": "the configuration that reproduces the run",
    "transcoder.safetensors": "weights, scales and the inference threshold",
    "metrics.jsonl": "training history, one line per logged step",
    "examples.parquet": "activating examples of every feature, ordered by feature",
    "analysis.json": "every figure of this report",
    "manifest.json": "sizes and sha256 of all files",
}


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
    calibration_tokens: int = 0
    """Fresh tokens that the threshold was calibrated on."""
    precision: str = "float32"
    """Arithmetic of the transcoder's products; weights, loss and optimizer are float32."""
    token_store: str = ""
    """URL of the tokenised text."""
    data_name: str
    """The text, as it was found."""
    documents: dict[str, int] = {}
    """Documents per split."""
    windows: dict[str, int] = {}
    """Windows per split."""
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
    versions: dict[str, str] = {}
    """Versions of the packages that matter."""
    files: tuple[str, ...] = tuple(_RUN_FILES)
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
    """Pre-activation above which a feature is active at inference."""
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
    loss: LossRecovered | None
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
    evaluation: Evaluation
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


def analyse(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    evaluation: Evaluation,
    statistics: FeatureStatistics,
    examples: pa.Table,
    history: list[dict[str, Any]],
    facts: RunFacts,
) -> Analysis:
    """Compute the report's figures.

    Args: `statistics` and `examples` from one pass over held-out tokens; `history` has a dict per logged step.
    Raises ValueError if statistics or evaluation belong to another dictionary.
    """
    if len(statistics.count) != transcoder.num_features:
        raise ValueError(
            f"statistics of {len(statistics.count)} features, but the dictionary has {transcoder.num_features}"
        )
    if tuple(evaluation.prefixes) != transcoder.prefixes:
        raise ValueError(
            f"evaluation of prefixes {evaluation.prefixes}, but the dictionary's are {transcoder.prefixes}"
        )
    features = _features(transcoder, statistics, examples)
    summary = _summary(config, transcoder, evaluation, statistics, examples, history, facts)
    insights, recommendations = judge(summary, config)
    return Analysis(
        summary=summary,
        config=config,
        training=Training(
            d_source=transcoder.shape.d_source,
            d_target=transcoder.shape.d_target,
            prefixes=transcoder.prefixes,
            input_norm=transcoder.shape.input_norm,
            input_scale=float(transcoder.input_scale),
            target_scale=float(transcoder.target_scale),
            threshold=float(transcoder.threshold),
            planned_steps=config.total_steps,
            fingerprint=config.fingerprint(),
        ),
        facts=facts,
        evaluation=evaluation,
        weights=_weights(transcoder, statistics),
        top_features=_top_features(features, config.analysis.num_top_features),
        features=features,
        insights=tuple(insights),
        recommendations=tuple(recommendations),
        files=_files(config.model.layer, facts),
    )


def _summary(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    evaluation: Evaluation,
    statistics: FeatureStatistics,
    examples: pa.Table,
    history: list[dict[str, Any]],
    facts: RunFacts,
) -> Summary:
    total = transcoder.num_features
    samples = _sample_counts(examples, total)
    with_samples = int((samples > 0).sum())
    fired = statistics.count > 0
    silent = total - int(fired.sum())
    dead = int((transcoder.tokens_since_fired >= config.transcoder.dead_after_tokens).sum())
    dense = statistics.count > DENSE * statistics.tokens
    few = samples[fired] < config.analysis.max_per_feature
    return Summary(
        total_features=total,
        trained_tokens=facts.trained_tokens,
        analysed_tokens=statistics.tokens,
        silent_features=silent,
        silent_fraction=silent / total,
        dead_features=dead,
        dead_fraction=dead / total,
        features_with_samples=with_samples,
        total_samples=int(samples.sum()),
        average_samples=int(samples.sum()) / max(1, with_samples),
        uniform_examples=examples.num_rows - int(samples.sum()),
        few_samples_fraction=float(few.mean()) if fired.any() else None,
        dense_features=int(dense.sum()),
        dense_fraction=int(dense.sum()) / total,
        dense_activation_share=int(statistics.count[dense].sum()) / max(1, int(statistics.count.sum())),
        evaluated_tokens=evaluation.tokens,
        prefixes=tuple(evaluation.prefixes),
        fvu=tuple(evaluation.fvu),
        explained_variance=tuple(1 - v for v in evaluation.fvu),
        l0=evaluation.l0[-1],
        k=transcoder.shape.k,
        loss=evaluation.loss,
        trend=_trend(history),
    )


def _features(
    transcoder: MatryoshkaTranscoder, statistics: FeatureStatistics, examples: pa.Table
) -> tuple[Feature, ...]:
    total = transcoder.num_features
    group = np.repeat(np.arange(len(transcoder.groups)), transcoder.shape.group_sizes)
    samples = _sample_counts(examples, total)
    ends = samples.cumsum()
    columns = _top_rows(examples, ["token_id", "token"]).to_pydict()
    peaks = list(zip(columns["token_id"], columns["token"], strict=True))
    since = transcoder.tokens_since_fired.tolist()
    norms = transcoder.W_dec.detach().double().norm(dim=1).tolist()
    features = []
    for j in range(total):
        count = int(statistics.count[j])
        # Counter keeps the order of first occurrence, which is that of strength, among equal counts.
        tokens = Counter(peaks[ends[j] - samples[j] : ends[j]]).most_common(TOP_TOKENS)
        features.append(
            Feature(
                feature=j,
                group=int(group[j]),
                max_activation=float(statistics.maximum[j]),
                mean_activation=float(statistics.total[j]) / max(1, count),
                count=count,
                density=count / max(1, statistics.tokens),
                samples=int(samples[j]),
                tokens_since_fired=since[j],
                decoder_norm=norms[j],
                top_tokens=tuple(TokenCount(token_id=i, token=t, count=n) for (i, t), n in tokens),
            )
        )
    return tuple(features)


def _top_features(features: tuple[Feature, ...], limit: int) -> tuple[TopFeature, ...]:
    strongest = sorted((f for f in features if f.count), key=lambda f: (-f.max_activation, f.feature))[:limit]
    return tuple(
        TopFeature(
            rank=rank,
            feature=f.feature,
            group=f.group,
            max_activation=f.max_activation,
            samples=f.samples,
            top_token=f.top_tokens[0].token if f.top_tokens else None,
        )
        for rank, f in enumerate(strongest, 1)
    )


def _weights(transcoder: MatryoshkaTranscoder, statistics: FeatureStatistics) -> Weights:
    encoder, decoder = transcoder.W_enc.detach().cpu().numpy(), transcoder.W_dec.detach().cpu().numpy()
    encoder_norm = np.linalg.norm(encoder.astype(np.float64), axis=1)
    decoder_norm = np.linalg.norm(decoder.astype(np.float64), axis=1)
    density = statistics.count / max(1, statistics.tokens)
    groups = tuple(
        Group(
            group=g,
            first=a,
            end=b,
            silent_features=int((statistics.count[a:b] == 0).sum()),
            mean_density=float(density[a:b].mean()),
            decoder_norm=float(decoder_norm[a:b].mean()),
        )
        for g, (a, b) in enumerate(transcoder.groups)
    )
    return Weights(
        encoder=_distribution(encoder),
        decoder=_distribution(decoder),
        encoder_norm=_distribution(encoder_norm),
        decoder_norm=_distribution(decoder_norm),
        groups=groups,
    )


def _distribution(values: NDArray[Any]) -> Distribution:
    return Distribution(
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
    )


def _trend(history: list[dict[str, Any]]) -> Trend | None:
    tail = history[-max(1, len(history) // 5) :]
    if len(tail) < MIN_TREND_ROWS:
        return None
    x = np.array([row["tokens"] for row in tail], np.float64)
    y = np.array([row["fvu"][-1] for row in tail], np.float64)
    x, mean = x - x.mean(), float(y.mean())
    if not np.isfinite(y).all() or not x.any() or mean <= 0:
        return None
    slope = float(x @ y) / float(x @ x)
    residual = y - mean - slope * x
    error = np.sqrt(float(residual @ residual) / (len(x) - 2) / float(x @ x))
    span = float(x[-1] - x[0])
    return Trend(rows=len(tail), fall=-slope * span / mean, standard_error=float(error) * span / mean)


def _sample_counts(examples: pa.Table, num_features: int) -> NDArray[np.int64]:
    """Stored top examples per feature, [features]."""
    return np.bincount(_top_rows(examples, ["feature"])["feature"].to_numpy(), minlength=num_features)


def _top_rows(examples: pa.Table, columns: list[str]) -> pa.Table:
    """Some columns of the samples, ordered by feature and strength as in the whole table."""
    return examples.select(columns).filter(pc.equal(examples["kind"], "top"))


def _files(layer: int, facts: RunFacts) -> tuple[File, ...]:
    described = (
        "this report",
        "the same figures, of all features, for programs",
        "quality, training, density, activations and samples at a glance",
        "strongest activation of each feature against its number of samples",
    )
    report = [File(name=n, description=d) for n, d in zip(report_names(layer), described, strict=True)]
    return (*report, *(File(name=n, description=_RUN_FILES.get(n, "")) for n in facts.files))
