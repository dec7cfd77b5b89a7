"""The report of a run of several layers: their figures side by side, and where each layer's own report lies."""

from __future__ import annotations

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
from mtc.results import (
    LAYERS_REPORT,
    NOT_MEASURED,
    GraphScores,
    Headline,
    Intervals,
    LayerFigures,
    LayersReport,
    ReplacedLayers,
    interval,
    number,
    percent,
    report_names,
)

PLOT = "layers_overview"


def write_layers_report(
    analyses: Sequence[Headline], replaced: ReplacedLayers | None, graphs: GraphScores | None
) -> dict[str, bytes]:
    """The files of the report by name, from the analyses of all layers of one run, in any order, what the language
    model does with all of these layers replaced at once, and what attribution graphs of held-out prompts explain."""
    analyses = sorted(analyses, key=lambda a: a.config.model.layer)
    layers = tuple(
        LayerFigures(layer=a.config.model.layer, directory=_directory(a), summary=a.summary) for a in analyses
    )
    with style():
        plot = picture(_plot(analyses))
    report = LayersReport(layers=layers, replaced=replaced, graphs=graphs)
    return {
        LAYERS_REPORT.markdown: render_markdown(_document(analyses, report, 0), {PLOT: f"{PLOT}.png"}).encode(),
        LAYERS_REPORT.html: render_html(_document(analyses, report, 1), {PLOT: plot.svg}).encode(),
        LAYERS_REPORT.json: report.model_dump_json(indent=1).encode(),
        f"{PLOT}.png": plot.png,
        f"{PLOT}.svg": plot.svg.encode(),
    }


def _directory(analysis: Headline) -> str:
    return f"layer{analysis.config.model.layer}"


def _document(analyses: Sequence[Headline], report: LayersReport, form: int) -> Document:
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
        sections=(
            Section("Layers", tuple(blocks)),
            Section("All layers replaced at once", tuple(_replaced(report.replaced))),
            Section("Attribution graphs", tuple(_graphs(report.graphs))),
            Section("Massive tokens", tuple(_massive(analyses))),
            Section("Timing", tuple(timing_blocks(f.timing))),
        ),
        provenance=provenance(first),
        stamp=stamp(first),
    )


def _table(analyses: Sequence[Headline], form: int) -> Table:
    rows: list[tuple[Text, ...]] = []
    for a in analyses:
        model, s = a.config.model, a.summary
        link = Link(f"layer {model.layer}", f"../{_directory(a)}/report/{report_names(model.layer)[form]}")
        loss = [share(s.loss.share_of_zero(-1)), share(s.loss.share_of_mean(-1))] if s.loss else [NOT_MEASURED] * 2
        silent = f"{number(s.silent_features)} of {number(s.total_features)}"
        ends = interval(s.fvu_interval, -1)
        beside = [number(s.line.fvu if s.line else None), number(s.all_tokens.fvu[-1])]
        rows.append((link, model.source, *(number(v) for v in s.fvu), ends, *beside, number(s.l0), silent, *loss))
    headers = ["Layer", "Source", *(f"FVU, {number(m)} features" for m in analyses[0].summary.prefixes)]
    headers += ["95 % interval", "FVU of the affine map", "FVU of all tokens"]
    headers += ["L0", "Silent features", "Loss recovered (zero ablation)"]
    headers += ["Loss recovered (mean ablation)"]
    return Table("Held-out figures of every layer", tuple(headers), tuple(rows))


def _replaced(found: ReplacedLayers | None) -> list[Block]:
    """What the set of transcoders is worth."""
    if found is None:
        return [Paragraph(f"The language model with all of these layers' MLPs replaced at once was {NOT_MEASURED}.")]
    none = ("none: the model as it is", number(found.ce_clean), "0", percent(1.0))
    rows = [none]
    for i, prefix in enumerate(found.prefixes):
        agrees = found.agreement_interval and found.agreement_interval[i]
        ends = f" ({percent(agrees[0])} to {percent(agrees[1])})" if agrees else ""
        rows.append((
            f"{number(prefix)} features a layer", _with_ends(found.ce_replaced[i], found.ce_interval, i),
            _with_ends(found.kl[i], found.kl_interval, i), percent(found.agreement[i]) + ends,
        ))  # fmt: skip
    rows += [(f"the MLPs' {what}", number(ce), NOT_MEASURED, NOT_MEASURED) for what, ce in
             (("mean output", found.ce_mean), ("output set to 0", found.ce_zero))]  # fmt: skip
    return [
        Table(
            "The language model with all of these layers replaced at once",
            ("In the MLPs' place", "Cross-entropy (nats per token)", "KL from the clean model (nats per token)",
             "Most likely token is the clean model's"),
            tuple(rows),
        ),
        Paragraph(
            f"Of {number(found.tokens)} held-out tokens of {number(found.documents)} documents, in one pass with the "
            f"MLPs of {number(len(found.layers))} layers replaced, each by the same prefix of its transcoder's nested "
            "dictionary; in brackets 95 % intervals over documents. Each transcoder reads what the replaced layers "
            "below it made, so errors add up, which no layer's own figures tell: loss recovered, above, replaces one "
            "layer and leaves the others as they are. BOS and other special tokens keep their MLPs' outputs in both; "
            "massive tokens are replaced."
        ),
    ]  # fmt: skip


def _graphs(found: GraphScores | None) -> list[Block]:
    """How much of held-out prompts' next tokens the set explains."""
    if found is None:
        return [Paragraph(f"Attribution graphs of held-out prompts were {NOT_MEASURED}.")]
    rows = []
    for i, prefix in enumerate(found.prefixes):
        scores = [prompt.scores[i] for prompt in found.prompts]
        values = ([s.replacement for s in scores], [s.completeness for s in scores], [s.special_errors for s in scores])
        rows.append((f"{number(prefix)} features a layer", *map(_mean_and_ends, values)))
    longest = max(len(prompt.token_ids) for prompt in found.prompts)
    return [
        Table(
            "What attribution graphs of held-out prompts explain",
            ("Features", "Replacement score", "Completeness score", "Influence of errors at special tokens"),
            tuple(rows),
        ),
        Paragraph(
            f"Means over {number(len(found.prompts))} prompts, the first {number(longest)} tokens of held-out windows, "
            "in brackets the lowest and the highest; their most probable next tokens are explained. The replacement "
            "score is the share of influence that ends in tokens and not in errors, completeness the share of what "
            "nodes read that does not come from errors, by influence. Errors are what transcoders miss, what features "
            f"beyond the {number(found.max_features)} strongest write, and all that MLPs write at special tokens and "
            "in layers without a transcoder. jobs/graph.py draws the graph of a prompt."
        ),
    ]


def _mean_and_ends(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return number(mean) + (f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else "")


def _massive(analyses: Sequence[Headline]) -> list[Block]:
    """How well massive tokens are carried, of the layers that have any."""
    rows = []
    for a in analyses:
        s, m = a.summary, a.summary.massive
        if not m.tokens:
            continue
        figures = (s.fvu[-1], s.all_tokens.fvu[-1], m.fvu(s.all_tokens.fvu[-1]), m.l0)
        shares = (m.share, m.variance, m.error)
        rows.append((
            f"layer {a.config.model.layer}", number(m.tokens), *(percent(v) for v in shares),
            *(number(v) for v in figures), number(s.massive_features),
        ))  # fmt: skip
    if not rows:
        return [
            Paragraph("No held-out token is massive at any of these layers (target norm above 5 times the median).")
        ]
    return [
        Table(
            "How massive tokens are carried, full dictionary",
            ("Layer", "Massive tokens", "Share of tokens", "Share of the variance", "Share of the squared error",
             "FVU without them", "FVU of all tokens", "FVU of massive tokens", "L0 on massive tokens",
             "Features of massive tokens"),
            tuple(rows),
        ),
        Paragraph(
            "Massive tokens have target norms above 5 times the median. FVU of massive tokens is their squared error "
            "over their own part of the variance of all tokens, around the mean of all; where it is small they are "
            "carried, whatever share of the variance they hold. Other layers have none."
        ),
    ]  # fmt: skip


def _with_ends(value: float, intervals: Intervals | None, i: int) -> str:
    return number(value) + (f" ({interval(intervals, i)})" if intervals else "")


def _plot(analyses: Sequence[Headline]) -> Figure:
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
