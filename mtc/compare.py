"""Two runs side by side: their figures, and their features matched by decoder cosine.

The matching is the one-to-one assignment with the largest sum of cosines (Kuhn's Hungarian method, 1955; as in Sharkey
et al. 2022 and Paulo and Belrose 2025, arXiv:2501.16615, who match dictionaries of several seeds). Features of the
larger dictionary that are left over have no partner.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, ConfigDict
from scipy.optimize import linear_sum_assignment

from mtc.report.format import NOT_MEASURED, escape, number, percent, table, token
from mtc.report.schema import Analysis
from mtc.runs import RunDirectory, load_analysis, load_transcoder, write_atomic

MAX_FEATURES = 16_384
"""Larger dictionaries are not matched: the method needs the whole matrix of cosines and its third power in time."""
LIMITS = (0.9, 0.7, 0.5)
SHOWN = 20


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )


class Side(_Part):
    """One run in figures."""

    run_id: str
    """Name of the run."""
    model: str
    """Language model."""
    layer: int
    """Layer whose MLP is imitated."""
    sites: str
    """What is read and reconstructed."""
    fingerprint: str
    """Of the configuration."""
    data_fingerprint: str
    """Of the tokenised text."""
    figures: dict[str, float | None]
    """Held-out figures by name; None if not measured."""


class Match(_Part):
    """A feature of each run."""

    feature_a: int
    """Of the first run."""
    feature_b: int
    """Of the second."""
    cosine: float
    """Between their decoder rows."""
    token_a: str | None
    """Most frequent peak token of the first; None without samples."""
    token_b: str | None
    """Of the second."""


class Matching(_Part):
    """The assignment as a whole."""

    pairs: int
    """Features that have a partner: the size of the smaller dictionary."""
    mean: float
    """Mean cosine of the pairs."""
    median: float
    """Median cosine."""
    shares: dict[str, float]
    """Share of the pairs with at least that cosine."""
    group_medians: tuple[float, ...]
    """Median cosine by group of the first run; NaN for a group without pairs."""
    same_token: float | None
    """Share of the pairs, of those that both have samples, whose most frequent peak token is the same."""
    nearest: tuple[Match, ...]
    """The pairs that agree best."""
    farthest: tuple[Match, ...]
    """Those that agree least."""


class Comparison(_Part):
    """Two runs, the first one called a and the second b."""

    format_version: int = 1
    """Layout of this file."""
    a: Side
    """The first run."""
    b: Side
    """The second run."""
    differences: tuple[str, ...]
    """Settings that differ, as `field: a, b`."""
    matching: Matching | None
    """None where features cannot be matched."""
    not_matched: str | None
    """Why not."""


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


def write_comparison(comparison: Comparison, pairs: pa.Table | None, directory: str) -> list[str]:
    """Write comparison.md, comparison.json and, if features were matched, matches.parquet; returns their places."""
    files = {
        "comparison.md": render(comparison).encode(),
        "comparison.json": comparison.model_dump_json(indent=1).encode(),
    }
    if pairs is not None:
        sink = pa.BufferOutputStream()
        pq.write_table(pairs, sink, compression="zstd")
        files["matches.parquet"] = bytes(sink.getvalue())
    places = []
    for name, data in files.items():
        places.append(os.path.join(directory, name))
        write_atomic(places[-1] if "://" in directory else os.path.abspath(places[-1]), data)
    return places


def render(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    a, b, matching = comparison.a, comparison.b, comparison.matching
    rows = []
    for name in a.figures | b.figures:
        of_a, of_b = a.figures.get(name), b.figures.get(name)
        change = NOT_MEASURED if of_a is None or of_b is None else number(of_b - of_a)
        rows.append([escape(name), number(of_a), number(of_b), change])
    about = [
        [name, escape(str(getattr(a, field))), escape(str(getattr(b, field)))]
        for name, field in (
            ("Run", "run_id"), ("Language model", "model"), ("Layer", "layer"), ("Sites", "sites"),
            ("Configuration fingerprint", "fingerprint"), ("Data fingerprint", "data_fingerprint"),
        )
    ]  # fmt: skip
    parts = [
        f"# {escape(a.run_id)} and {escape(b.run_id)}",
        table(["", "A", "B"], about),
        "## Figures",
        "On each run's own held-out text, at its calibrated threshold.",
        table(["Figure", "A", "B", "B - A"], rows),
        "## Settings that differ",
        "\n".join(f"- {escape(line)}" for line in comparison.differences) or "None.",
        "## Matched features",
    ]
    if matching is None:
        parts.append(f"Not matched: {escape(comparison.not_matched or '')}.")
        return "\n\n".join(parts) + "\n"
    figures = [
        ["Pairs", number(matching.pairs)],
        ["Mean cosine", number(matching.mean)],
        ["Median cosine", number(matching.median)],
        *([f"Pairs with a cosine of at least {limit}", percent(share)] for limit, share in matching.shares.items()),
        *([f"Median cosine, group {g} of A", number(m)] for g, m in enumerate(matching.group_medians)),
        ["Pairs with the same most frequent peak token", percent(matching.same_token)],
    ]
    parts += [
        "One to one, with the largest sum of decoder cosines (Hungarian method). All pairs are in matches.parquet.",
        table(["Figure", "Value"], figures),
    ]
    for title, some in (("The nearest pairs", matching.nearest), ("The farthest pairs", matching.farthest)):
        lines = [
            [number(m.feature_a), _token(m.token_a), number(m.feature_b), _token(m.token_b), number(m.cosine)]
            for m in some
        ]
        parts += [f"### {title}", table(["A", "Top token", "B", "Top token", "Cosine"], lines)]
    return "\n\n".join(parts) + "\n"


def _token(text: str | None) -> str:
    return "no samples" if text is None else token(text)


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
    figures |= {
        "Cosine, full dictionary": s.cosine[-1],
        "L0": s.l0,
        "k": s.k,
        "Loss recovered (zero ablation)": loss.recovered_zero[-1] if loss else None,
        "Loss recovered (mean ablation)": loss.recovered_mean[-1] if loss else None,
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
    of_a, of_b = (x.config.model_dump(mode="json", exclude={"output", "cluster"}) for x in (a, b))
    return tuple(
        f"{part}.{field}: {of_a[part][field]}, {of_b[part][field]}"
        for part in of_a
        for field in of_a[part]
        if of_a[part][field] != of_b[part][field]
    )


def _top_tokens(run: RunDirectory) -> list[str | None]:
    column = pq.read_table(pa.BufferReader(run.read("features.parquet")), columns=["top_tokens"])["top_tokens"]
    return [tokens[0]["token"] if tokens else None for tokens in column.to_pylist()]


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
