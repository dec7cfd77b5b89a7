"""Two runs side by side: their figures, and their features matched by decoder cosine.

The matching is the one-to-one assignment with the largest sum of cosines (Kuhn's Hungarian method, 1955; as in Sharkey
et al. 2022 and Paulo and Belrose 2025, arXiv:2501.16615, who match dictionaries of several seeds). Features of the
larger dictionary that are left over have no partner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.optimize import linear_sum_assignment

from mtc.results import SHOWN, Analysis, Comparison, Match, Matching, Side
from mtc.storage import RunDirectory, load_analysis, read_features
from mtc.transcoder import load_transcoder

MAX_FEATURES = 16_384
"""Most features of a dictionary that is matched: the method needs the whole matrix of cosines and its third power in
time."""
LIMITS = (0.9, 0.7, 0.5)


def compare_runs(a: RunDirectory, b: RunDirectory) -> tuple[Comparison, pa.Table | None]:
    """Compare two finished runs of one layer each; returns also all pairs as a table, if features could be matched.

    Raises RunError for a run without an analysis, or with one of another format.
    """
    first, second = load_analysis(a), load_analysis(b)
    reason = _cannot_match(first, second)
    pairs, matching = None, None
    if reason is None:
        W_dec_a, W_dec_b = (load_transcoder(run).W_dec.detach() for run in (a, b))
        pairs = match_features(W_dec_a, W_dec_b, _top_tokens(a), _top_tokens(b))
        for name, run in (("a", a), ("b", b)):
            pairs = pairs.append_column(f"label_{name}", _labels(run).take(pairs[f"feature_{name}"]))
        matching = _matching(pairs, first)
    comparison = Comparison(
        a=_side(first), b=_side(second), differences=_differences(first, second), matching=matching, not_matched=reason
    )
    return comparison, pairs


def match_features(
    W_dec_a: torch.Tensor, W_dec_b: torch.Tensor, tokens_a: Sequence[str | None], tokens_b: Sequence[str | None]
) -> pa.Table:
    """The assignment of rows [features_a, d] to rows [features_b, d] with the largest sum of cosines.

    Returns columns feature_a (ascending), feature_b, cosine, token_a, token_b.
    """
    unit_a, unit_b = (w.double() / w.double().norm(dim=1, keepdim=True).clamp(min=1e-12) for w in (W_dec_a, W_dec_b))
    cosine = (unit_a @ unit_b.T).cpu().numpy()
    of_a, of_b = linear_sum_assignment(cosine, maximize=True)
    return pa.table({
        "feature_a": of_a,
        "feature_b": of_b,
        "cosine": cosine[of_a, of_b],
        "token_a": pa.array([tokens_a[i] for i in of_a], pa.string()),
        "token_b": pa.array([tokens_b[i] for i in of_b], pa.string()),
    })  # fmt: skip


def _cannot_match(a: Analysis, b: Analysis) -> str | None:
    where = [(x.config.model.name, x.config.model.layer, x.config.model.target) for x in (a, b)]
    if where[0] != where[1]:
        return "decoder rows are comparable only for the same language model, layer and target"
    largest = max(x.summary.total_features for x in (a, b))
    if largest > MAX_FEATURES:
        return f"{largest:,} features are more than the {MAX_FEATURES:,} that are matched"
    return None


def _side(analysis: Analysis) -> Side:
    s, model = analysis.summary, analysis.config.model
    loss = s.loss
    figures: dict[str, float | None] = {
        "Features": s.total_features,
        "Trained tokens": s.trained_tokens,
        "Held-out tokens": s.evaluated_tokens,
    }
    for i, prefix in enumerate(s.prefixes):
        figures[f"FVU, {prefix:,} features"] = s.fvu[i]
        figures[f"FVU of all tokens, {prefix:,} features"] = s.all_tokens.fvu[i]
    figures |= {
        "Cosine, full dictionary": s.cosine[-1],
        "FVU of the affine map": s.line.fvu if s.line else None,
        "What the features add over it": s.line.added if s.line else None,
        "L0": s.l0,
        "L0 of all tokens": s.all_tokens.l0[-1],
        "k": s.k,
        "Massive tokens": s.massive.tokens,
        "Their share of the variance": s.massive.variance,
        "Features of massive tokens": s.massive_features,
        "Features that are copies": analysis.copies.features if analysis.copies else None,
        "Loss recovered (zero ablation)": loss.share_of_zero(-1) if loss else None,
        "Loss recovered (mean ablation)": loss.share_of_mean(-1) if loss else None,
        "KL (nats)": loss.kl[-1] if loss else None,
        "Silent features": s.silent_features,
        "Dead features": s.dead_features,
        "Dense features": s.dense_features,
    }
    return Side(
        run_id=analysis.facts.run_id,
        model=model.name,
        layer=model.layer,
        sites=f"{model.source} to {model.target}",
        fingerprint=analysis.training.fingerprint,
        data_fingerprint=analysis.facts.data_fingerprint,
        figures=figures,
    )


def _differences(a: Analysis, b: Analysis) -> tuple[str, ...]:
    of_a, of_b = (x.config.model_dump(mode="json", exclude={"output", "cluster", "sweep"}) for x in (a, b))
    return tuple(
        f"{part}.{field}: {of_a[part][field]}, {of_b[part][field]}"
        for part in of_a
        for field in of_a[part]
        if of_a[part][field] != of_b[part][field]
    )


def _top_tokens(run: RunDirectory) -> list[str | None]:
    column = read_features(run, ["top_tokens"])["top_tokens"]
    return [tokens[0]["token"] if tokens else None for tokens in column.to_pylist()]


def _labels(run: RunDirectory) -> pa.ChunkedArray:
    return read_features(run, ["label"])["label"]


def _matching(pairs: pa.Table, first: Analysis) -> Matching:
    cosine = pairs["cosine"].to_numpy()
    group = np.searchsorted(first.summary.prefixes, pairs["feature_a"].to_numpy(), "right")
    order = np.argsort(-cosine, kind="stable")
    both = [(x, y) for x, y in zip(pairs["token_a"].to_pylist(), pairs["token_b"].to_pylist(), strict=True) if x and y]

    def matches(index: Any) -> tuple[Match, ...]:
        return tuple(Match(**row) for row in pairs.take(index).to_pylist())

    return Matching(
        pairs=len(cosine),
        mean=float(cosine.mean()),
        median=float(np.median(cosine)),
        shares={str(limit): float((cosine >= limit).mean()) for limit in LIMITS},
        group_medians=tuple(
            float(np.median(cosine[group == g])) if (group == g).any() else float("nan")
            for g in range(len(first.summary.prefixes))
        ),
        same_token=sum(x == y for x, y in both) / len(both) if both else None,
        nearest=matches(order[:SHOWN]),
        farthest=matches(order[::-1][:SHOWN]),
    )
