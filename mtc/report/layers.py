"""The report of a run of several layers: their figures side by side, and where each layer's own report lies."""

from __future__ import annotations

import json
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtc.report import report_names
from mtc.report.format import NOT_MEASURED, escape, number, percent, table
from mtc.report.markdown import timing_section
from mtc.report.plots import DPI, layout, png
from mtc.report.schema import Analysis

MARKDOWN, JSON, PLOT = "layers_report.md", "layers_report.json", "layers_overview.png"


def write_layers_report(analyses: Sequence[Analysis]) -> dict[str, bytes]:
    """The files of the report by name, from the analyses of all layers of one run, in any order."""
    analyses = sorted(analyses, key=lambda a: a.config.model.layer)
    summaries = [
        {"layer": a.config.model.layer, "directory": _directory(a), "summary": a.summary.model_dump(mode="json")}
        for a in analyses
    ]
    return {
        MARKDOWN: _markdown(analyses).encode(),
        JSON: json.dumps(summaries, indent=1).encode(),
        PLOT: _plot(analyses),
    }


def _directory(analysis: Analysis) -> str:
    return f"layer{analysis.config.model.layer}"


def _markdown(analyses: Sequence[Analysis]) -> str:
    first = analyses[0]
    prefixes = first.summary.prefixes
    rows = []
    for a in analyses:
        model, s = a.config.model, a.summary
        link = f"[layer {model.layer}](../{_directory(a)}/report/{report_names(model.layer)[0]})"
        loss = (
            [percent(s.loss.recovered_zero[-1]), percent(s.loss.recovered_mean[-1])] if s.loss else [NOT_MEASURED] * 2
        )
        silent = f"{number(s.silent_features)} of {number(s.total_features)}"
        rows.append([link, escape(model.source), *(number(v) for v in s.fvu), number(s.l0), silent, *loss])
    headers = ["Layer", "Source", *(f"FVU, {number(m)} features" for m in prefixes), "L0", "Silent features"]
    headers += ["Loss recovered (zero ablation)", "Loss recovered (mean ablation)"]
    f = first.facts
    parts = [
        f"# Matryoshka transcoders, {escape(first.config.model.name)}, {number(len(analyses))} layers",
        f"One run, one forward pass of the language model for all layers: {number(f.trained_tokens)} tokens trained, "
        f"{number(first.summary.analysed_tokens)} held-out tokens analysed. FVU is the fraction of held-out variance "
        "left unexplained.",
        table(headers, rows),
        f"![Held-out FVU of every layer and prefix]({PLOT})",
        timing_section(f.timing),
    ]
    return "\n\n".join(parts) + "\n"


def _plot(analyses: Sequence[Analysis]) -> bytes:
    """Held-out FVU against the layer, a line per prefix, 1080 x 600 pixels."""
    figure = Figure(figsize=(1080 / DPI, 5), dpi=DPI, layout=layout())
    axes = figure.subplots()
    layers = [a.config.model.layer for a in analyses]
    for i, prefix in enumerate(analyses[0].summary.prefixes):
        axes.plot(layers, [a.summary.fvu[i] for a in analyses], marker="o", label=f"{number(prefix)} features")
    axes.set_xlabel("layer")
    axes.set_ylabel("held-out FVU")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    axes.set_title(f"{analyses[0].config.model.name}: held-out FVU by layer and prefix", parse_math=False)
    return png(figure)
