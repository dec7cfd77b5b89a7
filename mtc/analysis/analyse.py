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
from mtc.analysis.feature_table import alignment, features_table, read_feature, top_token
from mtc.analysis.logits import LogitEffects
from mtc.analysis.massive import MassiveSums
from mtc.analysis.rules import judge
from mtc.config import RunConfig
from mtc.results import (
    RUN_FILES,
    AbsorbedFeature,
    Analysis,
    Child,
    CopiedFeature,
    Copies,
    Distribution,
    Evaluation,
    Example,
    Family,
    File,
    Group,
    Histogram,
    PrefixStep,
    Probing,
    RunFacts,
    ShownFeature,
    Spelling,
    SplitFeature,
    Summary,
    TokenGain,
    TopFeature,
    Training,
    TrainingFit,
    Tree,
    Trend,
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
FAMILIES, CHILDREN, CANDIDATES = 20, 8, 20
MIN_TREND_ROWS = 5
MASSIVE_FEATURES = 5
COPIED = 20


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
    features = features_table(
        transcoder, found.statistics, found.examples, found.massive, found.effects, found.nesting, found.copies
    )
    if not facts.trained_tokens:
        at = features.schema.get_field_index("tokens_since_fired")
        features = features.set_column(at, features.schema.field(at), pa.nulls(len(features), pa.int64()))
    summary = _summary(config, transcoder, found, features, history, facts)
    tree = _tree(transcoder, found.nesting, features)
    copies = _copies(found.copies, features)
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
        training_fit=_training_fit(history, evaluation.fvu[-1]),
        k=transcoder.shape.k,
        loss=evaluation.loss,
        trend=_trend(history),
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
            top_token=top_token(features, j),
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
        )
        for row in chosen
    )


def _prefix_steps(transcoder: MatryoshkaTranscoder, found: Findings) -> tuple[PrefixStep, ...]:
    fvu = found.evaluation.fvu
    recovered = found.evaluation.loss.recovered_zero if found.evaluation.loss else None
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


def _tree(transcoder: MatryoshkaTranscoder, nesting: nested.Nesting | None, features: pa.Table) -> Tree | None:
    if nesting is None:
        return None
    parents = nesting.parents
    group = features["group"].to_numpy()

    def name(feature: int) -> str | None:
        return top_token(features, feature)

    def family(p: int) -> Family:
        own = np.flatnonzero(parents.parent == p)
        bond = parents.cosine[own] * parents.coactivation[own]
        children = [
            Child(
                feature=int(c),
                group=int(group[c]),
                top_token=name(int(c)),
                cosine=float(parents.cosine[c]),
                coactivation=float(parents.coactivation[c]),
                base_rate=float(parents.base_rate[c]),
            )
            for c in own[np.argsort(-bond, kind="stable")][:CHILDREN]
        ]
        return Family(
            feature=p, group=int(group[p]), top_token=name(p), num_children=len(own), children=tuple(children)
        )

    sizes = np.bincount(parents.parent[parents.parent >= 0], minlength=len(group))
    largest = np.argsort(-sizes, kind="stable")[:FAMILIES]
    spans = transcoder.groups
    return Tree(
        tokens=nesting.tokens,
        with_parent=tuple(int((parents.parent[a:b] >= 0).sum()) for a, b in spans),
        judged=tuple(int((parents.fired[a:b] >= nested.MIN_FIRED).sum()) for a, b in spans),
        families=tuple(family(int(p)) for p in largest if sizes[p]),
        splits=tuple(
            SplitFeature(
                feature=s.feature,
                top_token=name(s.feature),
                children=s.children,
                child_tokens=tuple(name(c) for c in s.children),
                fired=s.fired,
                coverage=s.coverage,
                overlap=s.overlap,
            )
            for s in nesting.splits[:CANDIDATES]
        ),
        num_splits=len(nesting.splits),
        absorptions=tuple(
            AbsorbedFeature(
                parent=a.parent,
                parent_token=name(a.parent),
                child=a.child,
                child_token=name(a.child),
                cosine=a.cosine,
                expected=a.expected,
                absorbed=a.absorbed,
            )
            for a in nesting.absorptions[:CANDIDATES]
        ),
        num_absorptions=len(nesting.absorptions),
        tested_pairs=nesting.tested_pairs,
        limits={
            "cosine above": nesting.min_cosine,
            "parent excess at least": nested.MIN_EXCESS,
            "sampled firings at least": nested.MIN_FIRED,
            "split coverage at least": nested.SPLIT_COVERAGE,
            "split overlap at most": nested.SPLIT_OVERLAP,
            "absorbed share at least": nested.ABSORBED_RATE,
            "absorber's part of the reach at least": nested.ABSORBER_SHARE,
        },
    )


def _copies(found: copied.FoundCopies | None, features: pa.Table) -> Copies | None:
    if found is None:
        return None
    is_copy = found.copy_of >= 0
    originals, count = np.unique(found.copy_of[is_copy], return_counts=True)
    most = np.argsort(-count, kind="stable")[:COPIED]
    return Copies(
        tokens=found.tokens,
        cosine=copied.COSINE,
        together=copied.TOGETHER,
        features=int(is_copy.sum()),
        share=float(is_copy.mean()),
        copied=tuple(
            CopiedFeature(
                feature=j,
                top_token=top_token(features, j),
                massive=features["massive"][j].as_py(),
                copies=tuple(np.flatnonzero(found.copy_of == j).tolist()),
            )
            for j in originals[most].tolist()
        ),
        num_copied=len(originals),
    )


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


def _tail(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last fifth of the logged steps."""
    return history[-max(1, len(history) // 5) :]


def _training_fit(history: list[dict[str, Any]], heldout: float) -> TrainingFit | None:
    """The training FVU beside the full dictionary's held-out FVU, both without massive tokens."""
    tail = _tail(history)
    fvu = float(np.mean([row["fvu"][-1] for row in tail])) if tail else 0.0
    return TrainingFit(rows=len(tail), fvu=fvu, excess=heldout / fvu - 1) if np.isfinite(fvu) and fvu > 0 else None


def _trend(history: list[dict[str, Any]]) -> Trend | None:
    tail = _tail(history)
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


def _files(layer: int, facts: RunFacts) -> tuple[File, ...]:
    report = [File(name=n, description=d) for n, d in report_files(layer).items()]
    return (*report, *(File(name=n, description=RUN_FILES.get(n, "")) for n in facts.files))
