"""The comparison of two runs as Markdown and JSON."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq

from mtc.report.format import escape, table
from mtc.results import NOT_MEASURED, Comparison, number, percent
from mtc.storage import write_atomic


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
        "On each run's own held-out text, at its calibrated threshold; FVU, cosine and L0 are without massive tokens, "
        "whose target norms are above 5 times the median, unless they are said to be of all tokens.",
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
            [number(m.feature_a), _label(m.label_a), number(m.feature_b), _label(m.label_b), number(m.cosine)]
            for m in some
        ]
        parts += [f"### {title}", table(["A", "Label", "B", "Label", "Cosine"], lines)]
    return "\n\n".join(parts) + "\n"


def _label(text: str | None) -> str:
    return "no samples" if text is None else escape(text)
