"""Records of an Analysis from what was found: the nested tree, copies, and how training went towards its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from mtc.analysis import copies as copied
from mtc.analysis import nesting as nested
from mtc.analysis.feature_table import label_of
from mtc.results import AbsorbedFeature, Child, CopiedFeature, Copies, Family, SplitFeature, TrainingFit, Tree, Trend
from mtc.transcoder import MatryoshkaTranscoder

FAMILIES, CHILDREN, CANDIDATES = 20, 8, 20
MIN_TREND_ROWS = 5
COPIED = 20


def tree_of(transcoder: MatryoshkaTranscoder, nesting: nested.Nesting | None, features: pa.Table) -> Tree | None:
    """The Tree of what was found about nesting, with the features' labels; None if it was not looked for."""
    if nesting is None:
        return None
    parents = nesting.parents
    group = features["group"].to_numpy()

    def name(feature: int) -> str | None:
        return label_of(features, feature)

    def family(p: int) -> Family:
        own = np.flatnonzero(parents.parent == p)
        bond = parents.cosine[own] * parents.coactivation[own]
        children = [
            Child(
                feature=int(c),
                group=int(group[c]),
                label=name(int(c)),
                cosine=float(parents.cosine[c]),
                coactivation=float(parents.coactivation[c]),
                base_rate=float(parents.base_rate[c]),
            )
            for c in own[np.argsort(-bond, kind="stable")][:CHILDREN]
        ]
        return Family(feature=p, group=int(group[p]), label=name(p), num_children=len(own), children=tuple(children))

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
                label=name(s.feature),
                children=s.children,
                child_labels=tuple(name(c) for c in s.children),
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
                parent_label=name(a.parent),
                child=a.child,
                child_label=name(a.child),
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


def copies_of(found: copied.FoundCopies | None, features: pa.Table) -> Copies | None:
    """The Copies of what was found, the most copied features first; None if they were not looked for."""
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
                label=label_of(features, j),
                massive=features["massive"][j].as_py(),
                copies=tuple(np.flatnonzero(found.copy_of == j).tolist()),
            )
            for j in originals[most].tolist()
        ),
        num_copied=len(originals),
    )


def training_fit(history: list[dict[str, Any]], heldout: float) -> TrainingFit | None:
    """The training FVU beside the full dictionary's held-out FVU, both without massive tokens."""
    tail = _tail(history)
    fvu = float(np.mean([row["fvu"][-1] for row in tail])) if tail else 0.0
    return TrainingFit(rows=len(tail), fvu=fvu, excess=heldout / fvu - 1) if np.isfinite(fvu) and fvu > 0 else None


def trend(history: list[dict[str, Any]]) -> Trend | None:
    """The Trend of the last fifth of the logged steps; None with too few of them."""
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


def _tail(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last fifth of the logged steps."""
    return history[-max(1, len(history) // 5) :]
