"""The report of a run of several layers: their figures side by side, and where each layer's own report lies."""

from __future__ import annotations

import json
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtc.report.blocks import Block, Document, Link, Paragraph, Plots, Section, Table, Text
from mtc.report.drawing import MARKERS, colours, new_figure, picture, style
from mtc.report.format import share
from mtc.report.html import render_html
from mtc.report.markdown import render_markdown
from mtc.report.sections.configuration import timing_blocks
from mtc.report.sections.provenance import captured, provenance, stamp
from mtc.results import LAYERS_REPORT, NOT_MEASURED, Analysis, interval, number, percent, report_names

PLOT = "layers_overview"


def write_layers_report(analyses: Sequence[Analysis]) -> dict[str, bytes]:
    """The files of the report by name, from the analyses of all layers of one run, in any order."""
    analyses = sorted(analyses, key=lambda a: a.config.model.layer)
    summaries = [
        {"layer": a.config.model.layer, "directory": _directory(a), "summary": json.loads(a.summary.model_dump_json())}
        for a in analyses
    ]
    with style():
        plot = picture(_plot(analyses))
    return {
        LAYERS_REPORT.markdown: render_markdown(_document(analyses, 0), {PLOT: f"{PLOT}.png"}).encode(),
        LAYERS_REPORT.html: render_html(_document(analyses, 1), {PLOT: plot.svg}).encode(),
        LAYERS_REPORT.json: json.dumps(summaries, indent=1).encode(),
        f"{PLOT}.png": plot.png,
        f"{PLOT}.svg": plot.svg.encode(),
    }


def _directory(analysis: Analysis) -> str:
    return f"layer{analysis.config.model.layer}"


def _document(analyses: Sequence[Analysis], form: int) -> Document:
    """The report of all layers as blocks; `form` says to which form of the layers' own reports it leads, an index into
    ReportNames."""
    first = analyses[0]
    model, f = first.config.model, first.facts
    blocks: list[Block] = [
        _table(analyses, form),
        Paragraph(
            "FVU is the fraction of held-out variance left unexplained. FVU and L0 are without massive tokens, whose "
            "target norms are above 5 times the median, unless they are said to be of all tokens."
        ),
        Plots(((PLOT, "Held-out FVU of every prefix against the layer; values in the table."),)),
    ]
    return Document(
        title=f"Matryoshka transcoders, {model.name}, {number(len(analyses))} layers",
        subtitle=f"One run, one forward pass of the language model for all layers: {number(f.trained_tokens)} tokens "
        f"trained{captured(f)}, {number(first.summary.analysed_tokens)} held-out tokens analysed.",
        sections=(Section("Layers", tuple(blocks)), Section("Timing", tuple(timing_blocks(f.timing)))),
        provenance=provenance(first),
        stamp=stamp(first),
    )


def _table(analyses: Sequence[Analysis], form: int) -> Table:
    rows: list[tuple[Text, ...]] = []
    for a in analyses:
        model, s = a.config.model, a.summary
        link = Link(f"layer {model.layer}", f"../{_directory(a)}/report/{report_names(model.layer)[form]}")
        loss = [share(s.loss.share_of_zero(-1)), share(s.loss.share_of_mean(-1))] if s.loss else [NOT_MEASURED] * 2
        silent = f"{number(s.silent_features)} of {number(s.total_features)}"
        ends = interval(s.fvu_interval, -1)
        beside = [
            number(s.line.fvu if s.line else None), number(s.all_tokens.fvu[-1]), number(s.massive.tokens),
            percent(s.massive.variance),
        ]  # fmt: skip
        rows.append((link, model.source, *(number(v) for v in s.fvu), ends, *beside, number(s.l0), silent, *loss))
    headers = ["Layer", "Source", *(f"FVU, {number(m)} features" for m in analyses[0].summary.prefixes)]
    headers += ["95 % interval", "FVU of the affine map", "FVU of all tokens", "Massive tokens"]
    headers += ["Their share of the variance", "L0", "Silent features", "Loss recovered (zero ablation)"]
    headers += ["Loss recovered (mean ablation)"]
    return Table("Held-out figures of every layer", tuple(headers), tuple(rows))


def _plot(analyses: Sequence[Analysis]) -> Figure:
    """Held-out FVU against the layer, a line per prefix, 1080 x 680 pixels."""
    figure = new_figure(5.4, 3.4, 200)
    axes = figure.subplots()
    layers = [a.config.model.layer for a in analyses]
    prefixes = analyses[0].summary.prefixes
    for i, (prefix, colour) in enumerate(zip(prefixes, colours(len(prefixes)), strict=True)):
        values = [a.summary.fvu[i] for a in analyses]
        axes.plot(layers, values, color=colour, marker=MARKERS[i % len(MARKERS)], label=f"{number(prefix)} features")
    axes.set_xlabel("layer")
    axes.set_ylabel("held-out FVU (share of variance)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    axes.legend(fontsize=9)
    axes.set_title("Held-out FVU by layer and prefix")
    return figure
