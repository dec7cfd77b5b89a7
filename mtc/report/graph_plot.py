"""How much of an attribution graph each resolution of the dictionary explains, as a plot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from matplotlib.ticker import PercentFormatter

from mtc.report.drawing import COLOURS, GREY, INK, Picture, new_figure, picture, style
from mtc.report.format import visible
from mtc.results import Explained, Graph, number

_PARTS = (("tokens", COLOURS[2], ""), ("errors at special tokens", GREY, "///"), ("other errors", GREY, ""))
_PROMPT = 70


def resolutions(graph: Graph) -> Picture:
    """Where the targets' influence ends, for each prefix alone and with later features folded into it: a bar each."""
    rows = list(_rows(graph))
    with style():
        figure = new_figure(9.6, 1.5 + 0.42 * len(rows), 100)
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for (name, colour, hatch), n in zip(_PARTS, range(3), strict=True):
            widths = [_ends(found)[n] for _, found in rows]
            plain: dict[str, Any] = {
                "color": colour,
                "alpha": 0.9 if n == 0 else 0.45,
                "edgecolor": INK,
                "linewidth": 0.4,
            }
            axes.barh(range(len(rows)), widths, 0.72, left, label=name, hatch=hatch, **plain)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for y, (_, found) in enumerate(rows):
            axes.plot(found.completeness, y, "D", color=INK, markersize=6, label="completeness" if y == 0 else None)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("where the targets' influence ends; diamonds: completeness score")
        prompt = visible("".join(graph.tokens))
        prompt = prompt if len(prompt) <= _PROMPT else prompt[: _PROMPT - 1] + "…"
        axes.set_title(f"What each resolution explains: {prompt}", parse_math=False, loc="left")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of the prompt: the SVG names them, for the reader's fonts
            return picture(figure)


def _rows(graph: Graph) -> Iterator[tuple[str, Explained]]:
    for score in graph.scores:
        yield f"the first {number(score.prefix)} features", score
        if score.folded.features > score.features:
            yield f"with {number(score.folded.features - score.features)} folded in", score.folded


def _ends(found: Explained) -> tuple[float, float, float]:
    return found.replacement, found.special_errors, 1 - found.replacement - found.special_errors
