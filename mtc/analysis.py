"""Computes a run's Analysis once, from the final weights and the held-out pass; mtc.report.schema says what it is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtc.config import RunConfig
from mtc.evaluation import Evaluation
from mtc.examples import FeatureStatistics
from mtc.report import report_names
from mtc.report.rules import judge
from mtc.report.schema import (
    RUN_FILES,
    Analysis,
    Distribution,
    Feature,
    File,
    Group,
    RunFacts,
    Summary,
    TokenCount,
    TopFeature,
    Training,
    Trend,
    Weights,
)  # fmt: skip
from mtc.transcoder import MatryoshkaTranscoder

__all__ = ["Analysis", "RunFacts", "analyse"]

DENSE = 0.1
"""A feature that fires on a larger share of the tokens is called dense."""
TOP_TOKENS = 10
MIN_TREND_ROWS = 5


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
        raise ValueError(f"evaluation of prefixes {evaluation.prefixes}, the dictionary's are {transcoder.prefixes}")
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
            threshold=float(transcoder.threshold.mean()),
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
    return (*report, *(File(name=n, description=RUN_FILES.get(n, "")) for n in facts.files))
