"""The report's plots, as PNG bytes. Each function draws on a Figure of its own: no global pyplot state, no display."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from mtc.report.format import number
from mtc.report.schema import Analysis

DPI = 120
# Okabe and Ito's colours, told apart with any kind of colour vision; yellow is too pale on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "#666666"
_BINS = 40


def overview(analysis: Analysis, features: pa.Table, history: list[dict[str, Any]]) -> bytes:
    """Quality, training and features in a grid of 2 x 3, 1680 x 1008 pixels."""
    figure = Figure(figsize=(14, 8.4), dpi=DPI, layout=layout())
    axes = figure.subplots(2, 3)
    model = analysis.config.model
    title = f"{model.name}, layer {model.layer}: {number(analysis.summary.total_features)} features, "
    title += f"{number(analysis.summary.trained_tokens)} trained tokens"
    figure.suptitle(title, fontsize=13, parse_math=False)
    _prefix_fvu(axes[0, 0], analysis)
    _training_curves(axes[0, 1], analysis, history)
    _sparsity(axes[0, 2], analysis, history)
    fired = features.filter(pc.greater(features["count"], 0))
    groups = fired["group"].to_numpy()
    n, s = len(analysis.weights.groups), analysis.summary
    density = np.log10(fired["density"].to_numpy())
    _histogram(axes[1, 0], density, groups, n, f"Activation density; {number(s.silent_features)} silent left out")
    axes[1, 0].set_xlabel("log10 of the share of held-out tokens")
    maximum = fired["max_activation"].to_numpy()
    _histogram(axes[1, 1], maximum, groups, n, "Strongest activation of each feature that fired")
    axes[1, 1].set_xlabel("max activation (scaled units)")
    samples = fired["samples"].to_numpy()
    limit = number(analysis.config.analysis.max_per_feature)
    _histogram(axes[1, 2], samples, groups, n, f"Samples of each feature that fired (at most {limit})")
    axes[1, 2].set_xlabel("samples")
    return png(figure)


def activation_vs_samples(analysis: Analysis, features: pa.Table) -> bytes:
    """Strongest activation against number of samples, a dot per feature that fired, 1400 x 960 pixels."""
    figure = Figure(figsize=(1400 / DPI, 8), dpi=DPI, layout=layout())
    axes = figure.subplots()
    fired = features.filter(pc.greater(features["count"], 0))
    groups = fired["group"].to_numpy()
    colours = _colours(len(analysis.weights.groups))
    for g, colour in enumerate(colours):
        size = int((groups == g).sum())
        axes.scatter([], [], s=30, color=colour, linewidths=0, label=f"group {g} ({number(size)} features)")
    if len(groups):
        # Most features share the largest number of samples; in a mixed order no group hides the others.
        order = np.random.default_rng(0).permutation(len(groups))
        strongest = fired["max_activation"].to_numpy()[order]
        of_group = [colours[g] for g in groups[order]]
        axes.scatter(fired["samples"].to_numpy()[order], strongest, s=18, alpha=0.6, c=of_group, linewidths=0)
        if strongest.max() > 20 * strongest.min() > 0:
            axes.set_yscale("log")
        axes.legend(loc="best", fontsize=10)
        axes.xaxis.set_major_locator(_whole_numbers())
    else:
        _say(axes, "no feature fired")
    axes.set_title("Strongest activation against number of samples")
    axes.set_xlabel(f"samples (stored top examples, at most {number(analysis.config.analysis.max_per_feature)})")
    axes.set_ylabel("max activation (scaled units)")
    axes.grid(alpha=0.25)
    s = analysis.summary
    figure.supxlabel(
        f"{number(len(groups))} features that fired on {number(s.analysed_tokens)} held-out tokens. Not shown: "
        f"{number(s.silent_features)} silent features. Dead by the training counter: {number(s.dead_features)}.",
        fontsize=10, color=_GREY,
    )  # fmt: skip
    return png(figure)


def _prefix_fvu(axes: Axes, analysis: Analysis) -> None:
    s = analysis.summary
    values = [v if np.isfinite(v) else 0.0 for v in s.fvu]
    bars = axes.bar(range(len(values)), values, color=_colours(len(values)), width=0.6)
    axes.bar_label(bars, [number(v) for v in s.fvu], padding=2, fontsize=10)
    axes.set_xticks(range(len(values)), [number(m) for m in s.prefixes], rotation=45 if len(values) > 6 else 0)
    axes.margins(y=0.12)
    axes.set_title("Held-out FVU of each nested prefix")
    axes.set_xlabel("prefix (features)")
    axes.set_ylabel("FVU (1 - explained variance)")


def _training_curves(axes: Axes, analysis: Analysis, history: list[dict[str, Any]]) -> None:
    axes.set_title("Training loss and batch FVU per prefix")
    axes.set_xlabel("trained tokens")
    axes.set_ylabel("loss, FVU (share of variance)")
    if not history:
        _say(axes, "no training history")
        return
    tokens = [row["tokens"] for row in history]
    axes.plot(tokens, [row["loss"] for row in history], color=_GREY, linestyle="--", label="loss")
    for i, colour in enumerate(_colours(len(analysis.summary.prefixes))):
        label = f"FVU, {number(analysis.summary.prefixes[i])} features"
        axes.plot(tokens, [row["fvu"][i] for row in history], color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.legend(fontsize=9)
    axes.grid(alpha=0.25)


def _sparsity(axes: Axes, analysis: Analysis, history: list[dict[str, Any]]) -> None:
    axes.set_title("L0 and dead features during training")
    axes.set_xlabel("trained tokens")
    axes.set_ylabel("L0 (active features per token)", color=_COLOURS[0])
    if not history:
        _say(axes, "no training history")
        return
    tokens = [row["tokens"] for row in history]
    l0, dead = [row["l0"] for row in history], [row["dead"] for row in history]
    axes.plot(tokens, l0, color=_COLOURS[0])
    axes.axhline(analysis.summary.k, color=_COLOURS[0], linestyle=":", label=f"k = {analysis.summary.k}")
    axes.set_ylim(0, 1.3 * max(analysis.summary.k, *l0))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.legend(loc="upper left", fontsize=9)
    right = axes.twinx()
    right.plot(tokens, dead, color=_COLOURS[5])
    right.set_ylim(0, max(1, 2 * max(dead)))  # below the line of L0
    right.yaxis.set_major_locator(_whole_numbers())
    after = number(analysis.config.transcoder.dead_after_tokens)
    right.set_ylabel(f"dead features (silent for {after} tokens)", color=_COLOURS[5])


def _histogram(axes: Axes, values: NDArray[Any], groups: NDArray[np.int64], num_groups: int, title: str) -> None:
    """Counts per bin, one colour per group on top of each other."""
    axes.set_title(title)
    axes.set_ylabel("features")
    if len(values) == 0:
        _say(axes, "no feature fired")
        return
    low, high = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.integer):
        # Bins of whole numbers, so that no bin holds more of them than its neighbour.
        step = max(1, -(-int(high - low + 1) // _BINS))
        edges = np.arange(low - 0.5, high + step + 0.5, step)
    else:
        bins = min(_BINS, max(8, int(2 * len(values) ** 0.5)))
        edges = np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.5, high + 0.5])
    parts = [values[groups == g] for g in range(num_groups)]
    labels = [f"group {g}" for g in range(num_groups)]
    axes.hist(parts, bins=edges.tolist(), stacked=True, color=_colours(num_groups), label=labels)
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.margins(y=0.2)  # room for the legend
    axes.legend(fontsize=9)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True)


def _colours(count: int) -> list[str]:
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    sampled = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))
    return [matplotlib.colors.to_hex(c) for c in sampled]


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _short(value: float, position: object = None) -> str:
    """Token counts as 500k, 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)  # inches


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
