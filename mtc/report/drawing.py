"""How plots look, and their files: the same figure gives the same bytes, without dates and random names.

SVG text stays text. Ink, paper and the grey of remarks have colours of their own, which a page can replace by its
colour scheme's (mtc.report.html).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from mtc.report.palette import GREY, INK, PAPER

# Okabe and Ito's colours, told apart with any kind of colour vision; yellow is too pale on white.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MARKERS = "os^DvP"
_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_STYLE: Any = {
    "font.family": ["DejaVu Sans"], "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    "legend.facecolor": PAPER, "grid.color": GREY, "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": "medium", "legend.framealpha": 0.8,
    "axes.unicode_minus": False, "svg.fonttype": "none", "svg.hashsalt": "mtc",
}  # fmt: skip


class Picture(NamedTuple):
    """A plot as files."""

    png: bytes
    svg: str


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures are made and drawn, with the report's fonts and colours."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """A figure of so many inches, without pyplot's state."""
    return Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))


def picture(figure: Figure) -> Picture:
    """A figure as both of its files."""
    bitmap, text = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure).print_png(bitmap, metadata={"Software": None})
    figure.set_layout_engine("none")  # it has been laid out; once more would take as long as drawing
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(text, metadata=no_metadata)
    return Picture(bitmap.getvalue(), re.sub(r"'DejaVu Sans'", _FONTS, text.getvalue()))


def colours(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    sampled = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, count))
    return [matplotlib.colors.to_hex(c) for c in sampled]


def say(axes: Axes, text: str) -> None:
    """Write in the place of a plot why it could not be drawn."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def whole_numbers(bins: int = 6) -> MaxNLocator:
    return MaxNLocator(nbins=bins, steps=[1, 2, 5, 10], integer=True)


def short(value: float, position: object = None) -> str:
    """A token count in short: 500k, 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
