"""The report of one run: Markdown, JSON and plots, all from one Analysis."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mtc.report.schema import Analysis


def write_report(analysis: Analysis, features: pa.Table, history: list[dict[str, Any]]) -> dict[str, bytes]:
    """The report's files by name; `features` is the table of all features, `history` has a dict per logged step."""
    # Who only reads or computes an Analysis should not pay for matplotlib.
    from mtc.report.markdown import render_markdown
    from mtc.report.plots import activation_vs_samples, overview

    names = report_names(analysis.config.model.layer)
    contents = (
        render_markdown(analysis).encode(),
        analysis.model_dump_json(indent=1).encode(),
        overview(analysis, features, history),
        activation_vs_samples(analysis, features),
    )
    return dict(zip(names, contents, strict=True))


def report_names(layer: int) -> tuple[str, str, str, str]:
    """File names: Markdown, JSON, overview plot, scatter plot."""
    stem = f"layer{layer}_analysis"
    return f"{stem}_report.md", f"{stem}_report.json", f"{stem}_overview.png", "activation_vs_samples.png"
