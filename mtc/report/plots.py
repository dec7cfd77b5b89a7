"""The report's plots: each draws on axes that it is given; `render_plot` makes files, `overview` shows six in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from mtc.report.drawing import (
    COLOURS,
    GREY,
    INK,
    MARKERS,
    PAPER,
    Picture,
    colours,
    new_figure,
    picture,
    say,
    short,
    style,
    whole_numbers,
)
from mtc.report.label_plot import draw_label_scores
from mtc.results import OVERVIEW, Analysis, Intervals, Slice, number

_BINS = 40
MANY_DOTS = 2000
"""Dots of a scatter plot above which it is a bitmap inside the SVG."""


class PlotData(NamedTuple):
    """What the plots of one run show."""

    analysis: Analysis
    features: pa.Table
    """Table of all features, as in features.parquet."""
    history: list[dict[str, Any]]
    """Rows of the metrics history, one dict per logged training step."""

    @property
    def fired(self) -> pa.Table:
        """Features that fired, those of massive tokens left out: their activations would hide the others'."""
        return self.features.filter(pc.and_not(pc.greater(self.features["count"], 0), self.features["massive"]))

    @property
    def left_out(self) -> str:
        """What is left out of headline figures, for titles; nothing if nothing is."""
        return ", without massive tokens" if self.analysis.summary.massive.tokens else ""

    @property
    def features_left_out(self) -> str:
        count = self.analysis.summary.massive_features
        return f"; {number(count)} of massive tokens left out" if count else ""


def render_plot(name: str, data: PlotData) -> Picture:
    """The plot `name` of mtc.results.files.PLOTS or LABEL_PLOTS; 960 x 680 pixels but for the overview."""
    with style():
        return picture(overview(data) if name == OVERVIEW else _alone(name, data))


def overview(data: PlotData) -> Figure:
    """Quality, training and features in a grid of 2 x 3, 1680 x 1008 pixels."""
    figure = new_figure(14, 8.4, 120)
    axes = figure.subplots(2, 3)
    model, s = data.analysis.config.model, data.analysis.summary
    title = f"{model.name}, layer {model.layer}: {number(s.total_features)} features, "
    title += f"{number(s.trained_tokens)} trained tokens"
    figure.suptitle(title, fontsize=13, parse_math=False)
    parts = (prefix_fvu, training, sparsity, density, max_activation, samples)
    for draw, ax in zip(parts, axes.flat, strict=True):
        draw(ax, data)
    return figure


def prefix_fvu(axes: Axes, data: PlotData) -> None:
    s = data.analysis.summary
    axes.set_title(f"Held-out FVU of each prefix{data.left_out}")
    axes.set_ylabel("FVU (1 - explained variance)")
    _prefix_bars(axes, s.prefixes, s.fvu, s.fvu_interval)
    if s.massive.tokens:
        at = range(len(s.prefixes))
        axes.plot(at, s.all_tokens.fvu, linestyle="", marker="D", mfc=PAPER, color=INK, label="all tokens")
    if s.line:
        axes.axhline(s.line.fvu, color=GREY, linestyle="--", label=f"affine map {number(s.line.fvu)}")
    if s.massive.tokens or s.line:
        axes.margins(y=0.35)  # room for the legend
        axes.legend(fontsize=9, loc="upper right", ncols=2)


def prefix_recovered(axes: Axes, data: PlotData) -> None:
    s = data.analysis.summary
    axes.set_title("Loss recovered against zero ablation")
    if s.loss is None:
        axes.set_xlabel("prefix (features)")
        axes.set_ylabel("loss recovered (share)")
        return say(axes, "not measured")
    axes.set_ylabel("loss recovered (share)")
    if s.loss.share_of_zero(-1) is None:
        return say(axes, "zero ablation does not raise the loss")
    _prefix_bars(axes, s.prefixes, s.loss.recovered_zero, s.loss.recovered_zero_interval)


def training(axes: Axes, data: PlotData) -> None:
    axes.set_title("Training loss and batch FVU per prefix")
    axes.set_xlabel("trained tokens")
    axes.set_ylabel("loss, FVU (share of variance)")
    if not data.history:
        return say(axes, "no training history")
    tokens = [row["tokens"] for row in data.history]
    axes.plot(tokens, [row["loss"] for row in data.history], color=GREY, linestyle="--", label="loss")
    prefixes = data.analysis.summary.prefixes
    for i, colour in enumerate(colours(len(prefixes))):
        label = f"FVU, {number(prefixes[i])} features"
        axes.plot(tokens, [row["fvu"][i] for row in data.history], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(fontsize=9)
    axes.grid()


def sparsity(axes: Axes, data: PlotData) -> None:
    axes.set_title("L0 and dead features during training")
    axes.set_xlabel("trained tokens")
    axes.set_ylabel("L0 (active features per token)")
    if not data.history:
        return say(axes, "no training history")
    history, k = data.history, data.analysis.summary.k
    tokens = [row["tokens"] for row in history]
    l0, dead = [row["l0"] for row in history], [row["dead"] for row in history]
    (line,) = axes.plot(tokens, l0, color=COLOURS[0], label="L0 (left axis)")
    goal = axes.axhline(k, color=COLOURS[0], linestyle=":", label=f"k = {k}")
    axes.set_ylim(0, 1.7 * max(k, *l0))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    (other,) = right.plot(tokens, dead, color=COLOURS[5], linestyle="--", label="dead features (right axis)")
    right.set_ylim(0, max(1, 2 * max(dead)))  # below the line of L0
    right.yaxis.set_major_locator(whole_numbers())
    after = number(data.analysis.config.transcoder.dead_after_tokens)
    right.set_ylabel(f"dead (silent for {after} tokens)")
    axes.legend(handles=[line, goal, other], loc="upper left", fontsize=9)


def l0(axes: Axes, data: PlotData) -> None:
    axes.set_title(f"Active features per token{data.left_out}")
    axes.set_xlabel("active features (L0 of a token)")
    axes.set_ylabel("tokens")
    counts = data.analysis.evaluation.l0_counts
    if not sum(counts):
        return say(axes, "not measured")
    # Bins of whole numbers, at most a few dozen.
    step = -(-len(counts) // 60)
    padded = np.pad(np.array(counts, np.int64), (0, -len(counts) % step)).reshape(-1, step).sum(1)
    axes.bar(np.arange(len(padded)) * step - 0.5, padded, width=step, align="edge", color=COLOURS[0], edgecolor=PAPER)
    mean, k = data.analysis.summary.l0, data.analysis.summary.k
    axes.axvline(mean, color=INK, linewidth=1.2, label=f"mean {number(mean)}")
    axes.axvline(k, color=INK, linewidth=1.2, linestyle=":", label=f"k = {number(k)}")
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(fontsize=9)


def density(axes: Axes, data: PlotData) -> None:
    histogram, s = data.analysis.density, data.analysis.summary
    axes.set_title(f"Density of features; {number(s.silent_features)} silent left out")
    axes.set_xlabel("log10 of the share of held-out tokens")
    axes.set_ylabel("features")
    total = np.array(histogram.counts, np.int64).sum(0)
    used = np.flatnonzero(total)
    if not len(used):
        return say(axes, "no feature fired")
    bins = slice(int(used[0]), int(used[-1]) + 1)
    edges = np.array(histogram.edges)
    base = np.zeros(len(total), np.int64)
    for g, (counts, colour) in enumerate(zip(histogram.counts, colours(len(histogram.counts)), strict=True)):
        axes.bar(
            edges[:-1][bins], np.array(counts)[bins], np.diff(edges)[bins], base[bins], align="edge", color=colour,
            edgecolor=PAPER, label=f"group {g}",
        )  # fmt: skip
        base += np.array(counts)
    axes.yaxis.set_major_locator(whole_numbers())
    axes.margins(y=0.2)
    axes.legend(fontsize=9)


def fvu_by_position(axes: Axes, data: PlotData) -> None:
    axes.set_title(f"Held-out FVU by position{data.left_out}")
    axes.set_xlabel("position (tokens)")
    _slices(axes, data.analysis.evaluation.by_position, data.analysis.summary.prefixes)


def fvu_by_frequency(axes: Axes, data: PlotData) -> None:
    axes.set_title(f"Held-out FVU by frequency{data.left_out}")
    axes.set_xlabel("occurrences in the held-out text (tokens)")
    _slices(axes, data.analysis.evaluation.by_frequency, data.analysis.summary.prefixes)


def max_activation(axes: Axes, data: PlotData) -> None:
    axes.set_title("Strongest activation of each feature that fired")
    axes.set_xlabel(f"max activation (scaled units){data.features_left_out}")
    _histogram(axes, data, data.fired["max_activation"].to_numpy())


def samples(axes: Axes, data: PlotData) -> None:
    limit = number(data.analysis.config.analysis.max_per_feature)
    axes.set_title("Samples of each feature that fired")
    axes.set_xlabel(f"samples (at most {limit}){data.features_left_out}")
    _histogram(axes, data, data.fired["samples"].to_numpy())


def activation_vs_samples(axes: Axes, data: PlotData) -> None:
    """A dot per feature that fired."""
    fired, s = data.fired, data.analysis.summary
    groups, n = fired["group"].to_numpy(), len(data.analysis.weights.groups)
    of_massive = f", {number(s.massive_features)} of massive tokens" if s.massive_features else ""
    axes.set_title("Strongest activation against number of samples")
    limit = number(data.analysis.config.analysis.max_per_feature)
    axes.set_xlabel(f"samples (at most {limit})\nnot shown: {number(s.silent_features)} silent features{of_massive}")
    axes.set_ylabel("max activation (scaled units)")
    axes.grid()
    if not len(groups):
        return say(axes, "no feature fired")
    palette = colours(n)
    for g, colour in enumerate(palette):
        size = int((groups == g).sum())
        label = f"group {g} ({number(size)} features)"
        axes.plot([], [], linestyle="", marker=MARKERS[g % len(MARKERS)], color=colour, label=label)
    # Most features share the largest number of samples; a little to the side no dot hides the others.
    generator = np.random.default_rng(0)
    strongest, count = fired["max_activation"].to_numpy(), fired["samples"].to_numpy().astype(np.float64)
    spread = 0.01 * max(1.0, count.max() - count.min())
    count += generator.uniform(-spread, spread, len(count))
    many = len(groups) > MANY_DOTS
    # Few dots bear their group's mark; many are one set in mixed order, so that no group hides the others.
    for part in [generator.permutation(len(groups))] if many else [np.flatnonzero(groups == g) for g in range(n)]:
        if len(part):
            marker = "o" if many else MARKERS[groups[part[0]] % len(MARKERS)]
            axes.scatter(
                count[part], strongest[part], s=10, alpha=0.6, c=[palette[g] for g in groups[part]], linewidths=0,
                marker=marker, rasterized=many,
            )  # fmt: skip
    if strongest.max() > 20 * strongest.min() > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(whole_numbers())
    axes.legend(loc="best", fontsize=9)


def label_scores(axes: Axes, data: PlotData) -> None:
    draw_label_scores(axes, data.analysis.labelling)


def _alone(name: str, data: PlotData) -> Figure:
    figure = new_figure(4.8, 3.4, 200)
    _DRAW[name](figure.subplots(), data)
    return figure


def _prefix_bars(axes: Axes, prefixes: Any, values: Any, ends: Intervals | None) -> None:
    at = range(len(prefixes))
    axes.set_xticks(at, [number(m) for m in prefixes], rotation=45 if len(prefixes) > 6 else 0)
    axes.set_xlabel("prefix (features)" + ("; whiskers: 95 % interval" if ends else ""))
    finite = [v if np.isfinite(v) else 0.0 for v in values]
    bars = axes.bar(at, finite, color=colours(len(finite)), width=0.6)
    labels = [number(v) for v in values]
    if ends:
        known = [(i, v, low, high) for i, (v, (low, high)) in enumerate(zip(values, ends, strict=True))]
        for i, value, low, high in known:
            if np.isfinite([value, low, high]).all():
                # Percentile intervals need not hold the value.
                spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
                axes.errorbar([i], [value], yerr=spread, color=INK, capsize=4, linewidth=1.2)
        for (i, value, low, high), text in zip(known, labels, strict=True):
            peak = max([v for v in (value, low, high) if np.isfinite(v)], default=0.0)
            axes.annotate(text, (i, max(0.0, peak)), (0, 4), textcoords="offset points", ha="center", va="bottom")
    else:
        axes.bar_label(bars, labels, padding=2)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(y=0.15)


def _slices(axes: Axes, slices: list[Slice], prefixes: tuple[int, ...]) -> None:
    axes.set_ylabel("FVU (share of variance)")
    if not slices:
        return say(axes, "not measured")
    names = [number(s.low) if s.low == s.high else f"{number(s.low)}–{number(s.high)}" for s in slices]
    tight = len(slices) * max(map(len, names)) > 30
    axes.set_xticks(range(len(slices)), names, rotation=30 if tight else 0)
    for i, colour in enumerate(colours(len(prefixes))):
        values = [s.fvu[i] for s in slices]
        label = f"{number(prefixes[i])} features"
        axes.plot(range(len(slices)), values, color=colour, marker=MARKERS[i % len(MARKERS)], label=label)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend(fontsize=9)


def _histogram(axes: Axes, data: PlotData, values: NDArray[Any]) -> None:
    """A histogram with one colour per group, the groups' counts on top of each other."""
    axes.set_ylabel("features")
    if len(values) == 0:
        return say(axes, "no feature fired")
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer):
        # Bins of whole numbers, so that no bin holds more of them than its neighbour.
        step = max(1, -(-int(high - low + 1) // _BINS))
        edges = np.arange(low - 0.5, high + step + 0.5, step)
        axes.xaxis.set_major_locator(whole_numbers())
    else:
        bins = min(_BINS, max(8, int(2 * len(values) ** 0.5)))
        edges = np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.5, high + 0.5])
    groups, n = data.fired["group"].to_numpy(), len(data.analysis.weights.groups)
    parts = [values[groups == g] for g in range(n)]
    labels = [f"group {g}" for g in range(n)]
    axes.hist(parts, bins=edges.tolist(), stacked=True, color=colours(n), label=labels, edgecolor=PAPER, linewidth=0.3)
    axes.yaxis.set_major_locator(whole_numbers())
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=9)


_DRAW: dict[str, Callable[[Axes, PlotData], None]] = {
    draw.__name__: draw
    for draw in (
        prefix_fvu, prefix_recovered, training, sparsity, l0, density, fvu_by_position, fvu_by_frequency,
        max_activation, samples, activation_vs_samples, label_scores,
    )
}  # fmt: skip
