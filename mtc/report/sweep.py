"""The report of a sweep: its transcoders' figures side by side, the Pareto front, and the one to take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mtc.analysis.pareto import RULE, Point, front, knee
from mtc.report.blocks import Block, Document, Items, Link, Paragraph, Plots, Section, Table, Text
from mtc.report.drawing import INK, MARKERS, colours, new_figure, picture, say, short, style
from mtc.report.format import share
from mtc.report.html import render_html
from mtc.report.markdown import render_markdown
from mtc.report.sections.configuration import setting, timing_blocks
from mtc.report.sections.provenance import captured, provenance, stamp
from mtc.results import NOT_MEASURED, Headline, interval, number, percent, report_names

MARKDOWN, HTML, JSON = "sweep_report.md", "sweep_report.html", "sweep_report.json"
PLOT = "sweep_overview"
MOST_TICKS = 6
LABEL_PIXELS = 8
"""About the width of a character of a name in the plot."""


class _Row(NamedTuple):
    """One transcoder of the sweep."""

    name: str
    analysis: Headline
    settings: Mapping[str, Any]
    """What the sweep sets for it, by dotted field."""
    on_front: bool
    taken: bool

    @property
    def layer(self) -> int:
        return self.analysis.config.model.layer

    @property
    def recovered(self) -> float | None:
        """Loss recovered against zero ablation; None if it was not measured or says nothing."""
        loss = self.analysis.summary.loss
        return loss.share_of_zero(-1) if loss else None


_Value = Callable[[_Row], float | None]


def write_sweep_report(analyses: Mapping[str, Headline], sweep: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The files of the report by name; `analyses` are those of the run's transcoders, by name and in the order of
    `RunConfig.members`, and `sweep` its entries."""
    rows = _rows(analyses, sweep)
    with style():
        plot = picture(_plot(rows))
    return {
        MARKDOWN: render_markdown(_document(rows, 0), {PLOT: f"{PLOT}.png"}).encode(),
        HTML: render_html(_document(rows, 1), {PLOT: plot.svg}).encode(),
        JSON: json.dumps(_as_json(rows), indent=1).encode(),
        f"{PLOT}.png": plot.png,
        f"{PLOT}.svg": plot.svg.encode(),
    }


def _rows(analyses: Mapping[str, Headline], sweep: Sequence[Mapping[str, Any]]) -> list[_Row]:
    """Every transcoder with its place among those of its layer: FVU of two layers can't be compared."""
    names = list(analyses)
    points = {name: Point(a.summary.l0, a.summary.fvu[-1]) for name, a in analyses.items()}
    best: set[str] = set()
    taken: set[str] = set()
    for layer in {a.config.model.layer for a in analyses.values()}:
        those = [name for name in names if analyses[name].config.model.layer == layer]
        best |= {those[i] for i in front([points[name] for name in those])}
        taken.add(those[knee([points[name] for name in those])])
    return [
        _Row(name, analyses[name], sweep[i % len(sweep)], name in best, name in taken) for i, name in enumerate(names)
    ]


def _as_json(rows: Sequence[_Row]) -> dict[str, Any]:
    members = [
        {
            "member": row.name,
            "directory": row.name,
            "layer": row.layer,
            "settings": dict(row.settings),
            "on_front": row.on_front,
            "taken": row.taken,
            "summary": json.loads(row.analysis.summary.model_dump_json()),
        }
        for row in rows
    ]
    return {"rule": RULE, "taken": {str(row.layer): row.name for row in rows if row.taken}, "members": members}


def _document(rows: Sequence[_Row], form: int) -> Document:
    """The report as blocks; `form` says to which form of the transcoders' own reports it leads, an index into
    ReportNames."""
    first = rows[0].analysis
    model, f = first.config.model, first.facts
    several = len({row.layer for row in rows}) > 1
    taken = tuple(_verdict(row, form, several) for row in rows if row.taken)
    compared: list[Block] = [
        *([Items(taken)] if several else [Paragraph(taken[0])]),
        Paragraph(RULE),
        _table(rows, form, several),
        Paragraph(
            "FVU is the fraction of held-out variance left unexplained, of the full dictionary. FVU and L0 are without "
            "massive tokens, whose target norms are above 5 times the median, unless they are said to be of all "
            "tokens. A silent feature did not fire on the held-out text; a dead one had not fired for "
            "transcoder.dead_after_tokens of training."
        ),
        *_nested_otherwise(rows),
        Plots(((
            PLOT,
            "Held-out FVU, loss recovered and silent features of every transcoder, against L0 and against its number "
            "of features; the Pareto front is a line and the transcoder to take has a ring; values in the table.",
        ),)),
    ]  # fmt: skip
    layers = f"{number(len({row.layer for row in rows}))} layers" if several else f"layer {model.layer}"
    return Document(
        title=f"Sweep of {number(len(rows))} Matryoshka transcoders, {model.name}, {layers}",
        subtitle=f"One run, one stream of activations for all: {number(f.trained_tokens)} tokens trained{captured(f)}, "
        f"{number(first.summary.analysed_tokens)} held-out tokens analysed.",
        sections=(Section("Transcoders", tuple(compared)), Section("Timing", tuple(timing_blocks(f.timing)))),
        provenance=provenance(first, of_sweep=True),
        stamp=stamp(first, of_sweep=True),
    )


def _nested_otherwise(rows: Sequence[_Row]) -> list[Block]:
    """A warning where transcoders of other numbers of groups are compared."""
    if len({len(row.analysis.summary.prefixes) for row in rows}) == 1:
        return []
    return [Paragraph(
        "The transcoders differ in how many nested prefixes they have. Each costs the full dictionary some FVU, of "
        "which the rule knows nothing: compare those that are nested alike."
    )]  # fmt: skip


def _link(row: _Row, form: int) -> Link:
    return Link(row.name, f"../{row.name}/report/{report_names(row.layer)[form]}")


def _verdict(row: _Row, form: int, several: bool) -> Text:
    s = row.analysis.summary
    figures = f"FVU {number(s.fvu[-1])} at L0 {number(s.l0)}"
    if row.recovered is not None:
        figures += f", loss recovered {percent(row.recovered)}"
    if s.silent_features:
        figures += f"; {percent(s.silent_fraction)} of its {number(s.total_features)} features are silent"
    return ("To take" + (f" at layer {row.layer}" if several else "") + ": ", _link(row, form), f", {figures}.")


def _table(rows: Sequence[_Row], form: int, several: bool) -> Table:
    lines: list[tuple[Text, ...]] = []
    fields = list(dict.fromkeys(field for row in rows for field in row.settings))
    for row in rows:
        s, config = row.analysis.summary, row.analysis.config
        parts = {"transcoder": config.transcoder, "optimizer": config.optimizer}
        values = {f"{part}.{name}": value for part, each in parts.items() for name, value in each}
        values["optimizer.lr"] = config.lr  # worked out where it is not given
        swept = [setting(values[field]) for field in fields]
        mark = "to take" if row.taken else "on the front" if row.on_front else ""
        lines.append((
            _link(row, form), *([number(row.layer)] if several else []), *swept, number(s.total_features), number(s.l0),
            number(s.fvu[-1]), interval(s.fvu_interval, -1),
            " / ".join(number(fvu) for fvu in s.fvu[:-1]) or "not nested", number(s.line.fvu if s.line else None),
            number(s.all_tokens.fvu[-1]), number(s.massive.tokens), percent(s.massive.variance),
            share(row.recovered) if s.loss else NOT_MEASURED,
            number(s.silent_features), number(s.dead_features), mark,
        ))  # fmt: skip
    headers = ["Transcoder", *(["Layer"] if several else []), *fields, "Features", "L0", "FVU", "95 % interval"]
    headers += [
        "FVU of its prefixes",
        "FVU of the affine map",
        "FVU of all tokens",
        "Massive tokens",
        "Their share of the variance",
    ]
    headers += ["Loss recovered (zero ablation)", "Silent features", "Dead features", "Choice"]
    return Table("Held-out figures of every transcoder", tuple(headers), tuple(lines), searchable=True)


def _plot(rows: Sequence[_Row]) -> Figure:
    """FVU, loss recovered and silent features against L0 and width, 1680 x 1560 pixels."""
    figure = new_figure(14, 13, 120)
    axes = figure.subplots(3, 2)
    figures: tuple[tuple[str, _Value, int], ...] = (
        ("held-out FVU (share of variance)", lambda row: row.analysis.summary.fvu[-1], 1),
        ("loss recovered against zero ablation (share)", lambda row: row.recovered, -1),
        ("silent features (share)", lambda row: row.analysis.summary.silent_fraction, 0),
    )
    for (by_l0, by_width), (label, value, better) in zip(axes, figures, strict=True):
        _draw(by_l0, rows, "L0 (active features per token)", _l0, label, value, better)
        _draw(by_width, rows, "features", lambda row: row.analysis.summary.total_features, label, value, 0)
    figure.suptitle(f"{rows[0].analysis.config.model.name}: {number(len(rows))} transcoders", parse_math=False)
    return figure


def _l0(row: _Row) -> float:
    return row.analysis.summary.l0


def _draw(axes: Axes, rows: Sequence[_Row], x_label: str, x: _Value, y_label: str, y: _Value, better: int) -> None:
    """A point for each transcoder; the Pareto front is drawn where `better` is 1, for less, or -1, for more."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    points = [(row, at, value) for row in rows if (at := x(row)) is not None and (value := y(row)) is not None]
    if not points:
        return say(axes, "not measured")
    layers = sorted({row.layer for row, _, _ in points})
    for layer, colour, marker in zip(layers, colours(len(layers)), cycle(MARKERS)):
        those = [(at, value) for row, at, value in points if row.layer == layer]
        axes.scatter(*zip(*those, strict=True), color=colour, marker=marker, label=f"layer {layer}", zorder=3)
        if better:
            best = [those[i] for i in front([Point(at, better * value) for at, value in those])]
            axes.plot(*zip(*best, strict=True), color=colour, linewidth=1)
    rings = [(at, value) for row, at, value in points if row.taken]
    axes.scatter(
        [at for at, _ in rings], [value for _, value in rings], s=160, facecolors="none", edgecolors=INK, zorder=4
    )
    smallest, largest = min(at for _, at, _ in points), max(at for _, at, _ in points)
    if largest >= 2 * smallest > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5) if largest < 8 * smallest else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    widths = sorted({at for _, at, _ in points if isinstance(at, int)})
    if 0 < len(widths) <= MOST_TICKS:
        axes.set_xticks(widths)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.margins(x=0.15, y=0.12)
    axes.grid()
    if len(layers) > 1:
        axes.legend(fontsize=9)
    _label(axes, sorted(points, key=lambda point: (not point[0].taken, not point[0].on_front)))


def _label(axes: Axes, points: Sequence[tuple[_Row, float, float]]) -> None:
    """Names beside the points, the first ones first, as far as they don't cover each other."""
    placed: list[tuple[float, float, float]] = []
    centre = sum(axes.get_xlim()) / 2 if axes.get_xscale() == "linear" else math.prod(axes.get_xlim()) ** 0.5
    for row, at, value in points:
        x, y = axes.transData.transform((at, value))
        right = at > centre
        width = 6 + LABEL_PIXELS * len(row.name)
        start = x - width if right else x
        if any(abs(y - other) < 14 and start < end and begin < start + width for begin, end, other in placed):
            continue
        placed.append((start, start + width, y))
        axes.annotate(
            row.name, (at, value), xytext=(-6 if right else 6, 4), textcoords="offset points", fontsize=8,
            ha="right" if right else "left", parse_math=False,
        )  # fmt: skip
