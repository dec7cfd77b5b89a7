"""Computes a run's Analysis once, from the final weights and the held-out pass."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtc.analysis import copies as copied
from mtc.analysis import nesting as nested
from mtc.analysis.evidence import Evidence
from mtc.analysis.examples import EDGES, Examples, FeatureStatistics
from mtc.analysis.feature_table import alignment, features_table, label_of, read_feature
from mtc.analysis.logits import LogitEffects
from mtc.analysis.massive import MassiveSums
from mtc.analysis.records import copies_of, training_fit, tree_of, trend
from mtc.analysis.rules import judge
from mtc.config import RunConfig
from mtc.results import (
    RUN_FILES,
    Analysis,
    Distribution,
    Evaluation,
    Example,
    File,
    Group,
    Histogram,
    PrefixStep,
    Probing,
    RunFacts,
    ShownFeature,
    Spelling,
    Summary,
    TokenGain,
    TopFeature,
    Training,
    Weights,
    report_files,
)
from mtc.transcoder import MatryoshkaTranscoder

__all__ = ["Analysis", "Findings", "RunFacts", "analyse"]
Array = NDArray[Any]
DENSE = 0.1
"""Share of the tokens above which a feature that fires on them is called dense."""
TOP_CONTEXTS = 5
QUANTILE_PARTS = 5
"""Parts, by size, that a feature's uniformly drawn activations are cut into to be shown: fifths."""
CONTEXTS_PER_PART = 2
GAIN_TOKENS = 10
MIN_GAIN_COUNT = 10
MASSIVE_FEATURES = 5


class Findings(NamedTuple):
    """What the held-out pass found about one transcoder."""

    evaluation: Evaluation
    """Metrics of the transcoder at the calibrated threshold."""
    statistics: FeatureStatistics
    """Counts, maxima and histograms of activations per feature."""
    examples: Examples
    """Activating examples ordered by feature."""
    token_errors: Array
    """[vocabulary, 1 + prefixes]: tokens with each id, and the sum of their squared errors, without massive tokens."""
    deviation: float
    """Mean squared deviation of the targets from their mean, without massive tokens: the unit of token gains."""
    massive: MassiveSums
    """Which tokens are massive, and what fires on them."""
    copies: copied.FoundCopies | None
    """Which features are copies of others; None without sampled tokens."""
    nesting: nested.Nesting | None
    """The nested tree; None with one group, or without sampled tokens."""
    effects: LogitEffects | None
    """What each feature does to the output logits; None if the whole model was not run."""
    contexts: pa.Table
    """Random contexts with all features that fire in them, columns as mtc.analysis.contexts.SCHEMA."""
    probing: Probing | None = None
    """What linear probes read from the features; None if it was not asked for."""
    spelling: Spelling | None = None
    """Whether the model can spell, and absorption on first letters; None if it was not asked for."""


def analyse(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    found: Findings,
    history: list[dict[str, Any]],
    facts: RunFacts,
) -> tuple[Analysis, pa.Table]:
    """Compute the report's figures, and the table of all features (mtc.analysis.feature_table).

    Args: `found` by one pass over held-out tokens; `history` has a dict per logged step, or none.
    Raises ValueError if statistics or evaluation belong to another dictionary.
    """
    evaluation = found.evaluation
    if tuple(evaluation.prefixes) != transcoder.prefixes:
        raise ValueError(f"evaluation of prefixes {evaluation.prefixes}, the dictionary's are {transcoder.prefixes}")
    occurrences = found.token_errors[:, 0] + found.massive.tokens
    features = features_table(
        transcoder, found.statistics, found.examples, found.massive, occurrences, found.effects, found.nesting,
        found.copies,
    )  # fmt: skip
    if not facts.trained_tokens:
        at = features.schema.get_field_index("tokens_since_fired")
        features = features.set_column(at, features.schema.field(at), pa.nulls(len(features), pa.int64()))
    summary = _summary(config, transcoder, found, features, history, facts)
    tree = tree_of(transcoder, found.nesting, features)
    copies = copies_of(found.copies, features)
    insights, recommendations = judge(Evidence(summary, config, evaluation, tree, copies))
    massive = features["massive"].to_numpy()
    top = _top_features(features, ~massive, config.analysis.num_top_features)
    analysis = Analysis(
        summary=summary,
        config=config,
        training=Training(
            d_source=transcoder.shape.d_source,
            d_target=transcoder.shape.d_target,
            prefixes=transcoder.prefixes,
            input_norm=transcoder.shape.input_norm,
            input_scale=float(transcoder.input_scale),
            target_scale=float(transcoder.target_scale),
            threshold=float(transcoder.threshold.detach().median()),
            planned_steps=config.total_steps,
            fingerprint=config.fingerprint(),
        ),
        facts=facts.model_copy(update={"analysed": datetime.now(UTC).isoformat(timespec="seconds")}),
        evaluation=evaluation,
        weights=_weights(transcoder, found.statistics),
        density=_density(transcoder, found.statistics),
        activation_edges=tuple(EDGES.tolist()),
        top_features=top,
        massive_features=_top_features(features, massive, MASSIVE_FEATURES),
        massive_indices=tuple(np.flatnonzero(massive).tolist()),
        copies=copies,
        features=_shown(config, features, found.examples, [f.feature for f in top]),
        prefix_steps=_prefix_steps(transcoder, found),
        tree=tree,
        probing=found.probing,
        spelling=found.spelling,
        labelling=None,
        insights=tuple(insights),
        recommendations=tuple(recommendations),
        files=_files(config.model.layer, facts),
    )
    return analysis, features


def _summary(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    found: Findings,
    features: pa.Table,
    history: list[dict[str, Any]],
    facts: RunFacts,
) -> Summary:
    statistics, evaluation = found.statistics, found.evaluation
    total = transcoder.num_features
    samples = features["samples"].to_numpy()
    with_samples = int((samples > 0).sum())
    fired = statistics.count > 0
    silent = total - int(fired.sum())
    # Weights from elsewhere come without the counter.
    idle = transcoder.tokens_since_fired >= config.transcoder.dead_after_tokens
    dead = int(idle.sum()) if facts.trained_tokens else None
    dense = statistics.count > DENSE * statistics.tokens
    few = samples[fired] < config.analysis.max_per_feature
    return Summary(
        total_features=total,
        trained_tokens=facts.trained_tokens,
        analysed_tokens=statistics.tokens,
        silent_features=silent,
        silent_fraction=silent / total,
        dead_features=dead,
        dead_fraction=None if dead is None else dead / total,
        features_with_samples=with_samples,
        total_samples=int(samples.sum()),
        average_samples=int(samples.sum()) / max(1, with_samples),
        uniform_examples=len(found.examples) - int(samples.sum()),
        few_samples_fraction=float(few.mean()) if fired.any() else None,
        dense_features=int(dense.sum()),
        dense_fraction=int(dense.sum()) / total,
        dense_activation_share=int(statistics.count[dense].sum()) / max(1, int(statistics.count.sum())),
        evaluated_tokens=evaluation.tokens,
        documents=evaluation.documents,
        prefixes=tuple(evaluation.prefixes),
        fvu=tuple(evaluation.fvu),
        fvu_interval=evaluation.fvu_interval,
        explained_variance=tuple(1 - v for v in evaluation.fvu),
        cosine=tuple(evaluation.cosine),
        l0=evaluation.l0[-1],
        all_tokens=evaluation.all_tokens,
        massive=evaluation.massive,
        massive_features=int(features["massive"].to_numpy().sum()),
        line=evaluation.line,
        training_fit=training_fit(history, evaluation.fvu[-1]),
        k=transcoder.shape.k,
        loss=evaluation.loss,
        trend=trend(history),
    )


def _top_features(features: pa.Table, wanted: NDArray[np.bool_], limit: int) -> tuple[TopFeature, ...]:
    """The strongest of the `wanted` features, [features], that fired."""
    strength, count = features["max_activation"].to_numpy(), features["count"].to_numpy()
    order = np.argsort(-strength, kind="stable")
    chosen = order[(wanted & (count > 0))[order]][:limit].tolist()
    return tuple(
        TopFeature(
            rank=rank,
            feature=j,
            group=features["group"][j].as_py(),
            max_activation=float(strength[j]),
            massive_activation=features["massive_activation"][j].as_py(),
            samples=features["samples"][j].as_py(),
            label=label_of(features, j),
        )
        for rank, j in enumerate(chosen, 1)
    )


def _shown(config: RunConfig, features: pa.Table, examples: Examples, strongest: list[int]) -> tuple[ShownFeature, ...]:
    """The features that are shown in full: the strongest, and some of each group drawn by the run's seed."""
    group, count = features["group"].to_numpy(), features["count"].to_numpy()
    generator = np.random.default_rng(config.data.seed)
    drawn: list[int] = []
    for g in range(int(group.max()) + 1):
        fired = np.flatnonzero((group == g) & (count > 0))
        fired = fired[~np.isin(fired, strongest)]
        some = generator.permutation(fired)[: config.analysis.num_random_features]
        drawn += sorted(some.tolist())
    contexts: dict[int, list[dict[str, Any]]] = {j: [] for j in strongest + drawn}
    for row in examples.table(list(contexts)).to_pylist():
        contexts[row["feature"]].append(row)
    return tuple(
        ShownFeature(
            reason="drawn" if some is drawn else "strongest",
            figures=read_feature(features, j),
            examples=_contexts(contexts[j]),
        )
        for some in (strongest, drawn)
        for j in some
    )


def _contexts(rows: list[dict[str, Any]]) -> tuple[Example, ...]:
    """A feature's contexts for the report: the strongest, then the first ones of each fifth of the sample, from the
    strongest fifth down."""
    chosen = [row for row in rows if row["kind"] == "top"][:TOP_CONTEXTS]
    sample = [row for row in rows if row["kind"] == "sample"]
    for part in reversed(range(QUANTILE_PARTS)):
        inside = [r for r in sample if min(int(r["quantile"] * QUANTILE_PARTS), QUANTILE_PARTS - 1) == part]
        chosen += inside[:CONTEXTS_PER_PART]
    return tuple(
        Example(
            kind=row["kind"],
            activation=row["activation"],
            quantile=row["quantile"],
            document_id=row["document_id"],
            tokens=tuple(row["context_tokens"]),
            activations=tuple(row["context_activations"]),
            peak=row["peak_index"],
            position=row["position"],
        )
        for row in chosen
    )


def _prefix_steps(transcoder: MatryoshkaTranscoder, found: Findings) -> tuple[PrefixStep, ...]:
    fvu = found.evaluation.fvu
    loss = found.evaluation.loss
    recovered = [loss.share_of_zero(g) for g in range(len(fvu))] if loss else None
    count, errors = found.token_errors[:, 0], found.token_errors[:, 1:]
    often = np.flatnonzero(count >= MIN_GAIN_COUNT)
    per_token = errors[often] / count[often, None] / found.deviation
    steps = []
    for g, prefix in enumerate(transcoder.prefixes):
        tokens: tuple[TokenGain, ...] = ()
        if g:
            gain = per_token[:, g - 1] - per_token[:, g]
            tokens = tuple(
                TokenGain(
                    token_id=int(often[i]),
                    token=found.examples.token(int(often[i])),
                    count=int(count[often[i]]),
                    before=float(per_token[i, g - 1]),
                    after=float(per_token[i, g]),
                )
                for i in np.argsort(-gain, kind="stable")[:GAIN_TOKENS]
                if gain[i] > 0
            )
        steps.append(
            PrefixStep(
                group=g,
                prefix=prefix,
                fvu_before=fvu[g - 1] if g else 1.0,
                fvu_after=fvu[g],
                recovered_before=recovered[g - 1] if g and recovered else None,
                recovered_after=recovered[g] if recovered else None,
                tokens=tokens,
                min_count=MIN_GAIN_COUNT,
            )
        )
    return tuple(steps)


def _density(transcoder: MatryoshkaTranscoder, statistics: FeatureStatistics) -> Histogram:
    """Features by density, in half decades from 10^-8 to 1, for each group."""
    edges = np.arange(-8, 0.25, 0.5)
    counts = []
    for a, b in transcoder.groups:
        density = statistics.count[a:b] / max(1, statistics.tokens)
        logs = np.log10(density[density > 0]).clip(edges[0], edges[-1])
        counts.append(tuple(np.histogram(logs, edges)[0].tolist()))
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts))


def _weights(transcoder: MatryoshkaTranscoder, statistics: FeatureStatistics) -> Weights:
    encoder, decoder = transcoder.W_enc.detach().cpu().numpy(), transcoder.W_dec.detach().cpu().numpy()
    encoder_norm = np.linalg.norm(encoder.astype(np.float64), axis=1)
    decoder_norm = np.linalg.norm(decoder.astype(np.float64), axis=1)
    density = statistics.count / max(1, statistics.tokens)
    aligned = alignment(transcoder)
    groups = tuple(
        Group(
            group=g,
            first=a,
            end=b,
            silent_features=int((statistics.count[a:b] == 0).sum()),
            mean_density=float(density[a:b].mean()),
            decoder_norm=float(decoder_norm[a:b].mean()),
            alignment=None if aligned is None else float(aligned[a:b].mean()),
        )
        for g, (a, b) in enumerate(transcoder.groups)
    )
    return Weights(
        encoder=_distribution(encoder),
        decoder=_distribution(decoder),
        encoder_norm=_distribution(encoder_norm),
        decoder_norm=_distribution(decoder_norm),
        alignment=None if aligned is None else _distribution(aligned),
        groups=groups,
    )


def _distribution(values: NDArray[Any]) -> Distribution:
    return Distribution(
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        min=float(values.min()),
        max=float(values.max()),
    )


def _files(layer: int, facts: RunFacts) -> tuple[File, ...]:
    report = [File(name=n, description=d) for n, d in report_files(layer).items()]
    return (*report, *(File(name=n, description=RUN_FILES.get(n, "")) for n in facts.files))
