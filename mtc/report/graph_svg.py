"""A drawing of an attribution graph for documents: tokens along x, layers along y, the next tokens on top.

One SVG file with the colours of the reader's scheme, laid out as graph_layout.js lays out the page, without folding.
Texts are escaped and made visible; the same graph gives the same bytes.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import escape

from mtc.report.format import short_label, spaced, visible
from mtc.results import Graph, GraphNode, number

MOST_LABELS, MOST_EDGES, MOST_MARKS = 40, 400, 100
_MARK, _WIDEST, _LOW, _TALL, _GAP, _AXIS = 22.0, 130.0, 24.0, 38.0, 4.0, 46.0
_CHARACTER, _LEAST_LABEL, _MOST_LABEL, _SPARE, _LOGIT = 6.7, 34.0, 124.0, 90.0, 92.0
_LEAST_HEIGHT, _MOST_APART = 340.0, 40.0
_ORDER = {"error": 0, "embedding": 1, "logit": 1, "feature": 2, "others": 3}
_SHAPES = {
    "error": '<path class="error" d="M0 -6.5L6.5 0L0 6.5L-6.5 0Z"/>',
    "embedding": '<rect class="embedding" x="-5.5" y="-5.5" width="11" height="11"/>',
    "logit": '<rect class="logit" x="-8" y="-5.5" width="16" height="11" rx="5.5"/>',
    "others": '<circle class="error" r="6"/><path class="dots" d="M-3 0h.01M0 0h.01M3 0h.01"/>',
}
_STYLE = """
text { font: 11px 'DejaVu Sans', Verdana, sans-serif; fill: #1b1f24 }
.mono { font: 10.5px 'DejaVu Sans Mono', Menlo, Consolas, monospace }
.paper { fill: #ffffff } .band { fill: #f5f6f8 } .rule { stroke: #d5d9df; fill: none } .muted { fill: #5a6069 }
.plus, .minus { fill: none; stroke: #0072b2 } .minus { stroke: #d55e00; stroke-dasharray: 5 3 }
.label { paint-order: stroke; stroke: #ffffff; stroke-width: 3.5px; stroke-linejoin: round }
.ring { fill: none; stroke: #009e73 } .dots { stroke: #5a6069; stroke-width: 2; stroke-linecap: round }
.feature { stroke: #009e73; stroke-width: 1.8; fill: #009e73 } .g1 { fill: #a6dbcd } .g2 { fill: #ffffff }
.error { fill: #ffffff; stroke: #5a6069; stroke-width: 1.8 } .embedding { fill: #1b1f24 } .logit { fill: #e69f00 }
@media (prefers-color-scheme: dark) {
text, .embedding { fill: #e4e7eb } .paper, .error, .g2 { fill: #14171b } .band { fill: #1d2127 }
.rule { stroke: #3a414b } .muted { fill: #a3abb6 } .label { stroke: #14171b } .error { stroke: #a3abb6 }
.plus { stroke: #56b4e9 } .minus { stroke: #ff9a4d } .g1 { fill: #0d5a48 } .logit { fill: #e0a526 }
}
"""


@dataclass
class _Spot:
    """A node's place."""

    number: int
    node: GraphNode
    x: float
    y: float = 0
    label: str = ""
    label_y: float = 21
    taken: float = 0
    """Half of the width that its label takes."""


class _Line(NamedTuple):
    """Marks side by side; `row` is 0 for embeddings, a layer + 1, and the number of layers + 1 for logits."""

    row: int
    spots: list[_Spot]


class _Column(NamedTuple):
    x: float
    width: float
    slots: int


def graph_svg(
    graph: Graph, labels: int = MOST_LABELS, edges: int = MOST_EDGES, marks: int = MOST_MARKS, width: int = 960
) -> str:
    """Tokens, targets and of the other nodes so many of most influence, the strongest edges between them, and so many
    labels where they have room; `width` is what is aimed at, long prompts take more."""
    whole, graph = graph, _strongest_nodes(graph, marks)
    columns, lines, total = _lines(graph, width - _AXIS)
    _place_labels(graph, lines, labels, total)
    height, bands, ticks = _place_lines(graph, lines, total)
    spots = {spot.number: spot for line in lines for spot in line.spots}
    found = _strongest(graph, edges)
    full_width, full_height = math.ceil(total + _AXIS), math.ceil(height + 30)
    title, description = _words(whole, len(graph.nodes), len(found))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full_width} {full_height}" width="{full_width}" '
        f'height="{full_height}" role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{full_width}" height="{full_height}"/>',
        *bands,
        *ticks,
        f'<g transform="translate({_AXIS:g} 0)">',
        *(f'<path class="rule" stroke-dasharray="1 5" d="M{c.x - 2:.1f} 0V{height:.1f}"/>' for c in columns[1:]),
        *_edges(found, spots),
        *(_mark(spot) for _, spot in sorted(spots.items())),
        *_tokens(graph, columns, height),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _strongest_nodes(graph: Graph, most: int) -> Graph:
    """The graph with so many features and errors, those of most influence."""
    inner = [n for n, node in enumerate(graph.nodes) if not node.target and node.kind != "embedding"]
    if len(inner) <= most:
        return graph
    left_out = set(sorted(inner, key=lambda n: -graph.nodes[n].influence)[most:])
    kept = [n for n in range(len(graph.nodes)) if n not in left_out]
    numbers = {n: i for i, n in enumerate(kept)}
    edges = tuple((numbers[s], numbers[t], w) for s, t, w in graph.edges if s in numbers and t in numbers)
    return graph.model_copy(update={"nodes": tuple(graph.nodes[n] for n in kept), "edges": edges})


def _row(node: GraphNode, layers: int) -> int:
    if node.kind == "embedding":
        return 0
    return layers + 1 if node.layer is None else node.layer + 1


def _lines(graph: Graph, width: float) -> tuple[list[_Column], list[_Line], float]:
    """Columns of tokens, lines of marks from the top, each with its x, and the width of all."""
    cells: dict[int, dict[int, list[_Spot]]] = defaultdict(lambda: defaultdict(list))
    for i, node in enumerate(graph.nodes):
        cells[_row(node, graph.layers)][node.token].append(_Spot(i, node, 0))
    logits = [spot for many in cells.pop(graph.layers + 1, {}).values() for spot in many]
    columns, pitch, total = _columns(graph, cells, width)
    lines, broad = _logit_lines(graph.layers + 1, logits, total)
    for row in range(graph.layers, -1, -1):
        found = {t: sorted(many, key=_by_kind) for t, many in sorted(cells.get(row, {}).items())}
        if not found:
            lines.append(_Line(row, []))
            continue
        high = {t: math.ceil(len(many) / columns[t].slots) for t, many in found.items()}
        for n in range(max(high.values()) - 1, -1, -1):
            spots = []
            for t, many in found.items():
                each, own = math.ceil(len(many) / high[t]), columns[t]
                part = many[n * each : (n + 1) * each]
                between = min(pitch, own.width / max(1, len(part)))
                for i, spot in enumerate(part):
                    spot.x = own.x + own.width / 2 + (i - (len(part) - 1) / 2) * between
                spots += part
            lines.append(_Line(row, spots))
    return columns, lines, broad


def _columns(
    graph: Graph, cells: dict[int, dict[int, list[_Spot]]], width: float
) -> tuple[list[_Column], float, float]:
    """As many slots for each token as its fullest cell has marks, fewer where that is wider than the page."""
    slots = [max([1, *(len(row.get(t, ())) for row in cells.values())]) for t in range(len(graph.tokens))]
    labels = [max(28.0, min(_MOST_LABEL, _width(spaced(text)) + 10)) for text in graph.tokens]

    def total(pitch: float) -> float:
        return sum(max(n * pitch, least) + _GAP for n, least in zip(slots, labels, strict=True))

    while total(_MARK) > width and max(slots) > 2:
        slots[slots.index(max(slots))] -= 1
    pitch = _WIDEST
    while pitch > _MARK and total(pitch) > width:
        pitch -= 1
    spare = min(_SPARE, max(0.0, (width - total(pitch)) / len(slots)))
    columns, x = [], 0.0
    for n, least in zip(slots, labels, strict=True):
        columns.append(_Column(x, max(n * pitch, least) + spare, n))
        x += columns[-1].width + _GAP
    return columns, pitch, x


def _logit_lines(row: int, logits: list[_Spot], total: float) -> tuple[list[_Line], float]:
    """Logits over the whole width, the strongest below, above the last token: others' edges go past it. The width."""
    logits.sort(key=lambda spot: -spot.node.influence)
    high = math.ceil(len(logits) / max(1, max(total, 320) // _LOGIT)) or 1
    each = max(1, math.ceil(len(logits) / high))
    shift = 0.5 if high > 1 else 0.0
    broad = max(total, (each + shift) * _LOGIT)
    step = min(broad / (each + shift), _WIDEST + 24)
    lines = []
    for i, start in enumerate(range(0, len(logits), each)):
        many = logits[start : start + each]
        for n, spot in enumerate(many):
            spot.x = broad - (n + 0.5 + i % 2 * shift) * step
        lines.append(_Line(row, many))
    return lines[::-1], broad


def _by_kind(spot: _Spot) -> tuple[int, int, int]:
    return _ORDER[spot.node.kind], spot.node.feature or 0, spot.number


def _place_labels(graph: Graph, lines: Iterable[_Line], most: int, width: float) -> None:
    """The strongest nodes' labels, as far as they fit beside those of their line."""
    everything = [(line, spot) for line in lines for spot in line.spots]
    everything.sort(key=lambda each: (not each[1].node.target, -each[1].node.influence, each[1].number))
    for line, spot in everything:
        text = _label(spot.node) if most > 0 else ""
        if not text:
            continue
        taken = [other for other in line.spots if other.taken]
        left = max([0.0, *(o.x + o.taken for o in taken if o.x < spot.x)])
        right = min([width, *(o.x - o.taken for o in taken if o.x >= spot.x)])
        room = 2 * min(spot.x - left, right - spot.x, _MOST_LABEL / 2 + 5) - 10
        if room < min(_LEAST_LABEL, _width(text)):
            continue
        spot.label = _shorten(text, room)
        spot.taken = _width(spot.label) / 2 + 5
        most -= 1


def _label(node: GraphNode) -> str:
    if node.kind == "feature":
        more = f" +{node.folded}" if node.folded else ""
        return (short_label(node.text or "") or f"#{node.feature}") + more
    if node.kind == "logit":
        return f"{spaced(node.text or '')} {100 * (node.probability or 0):.3g} %"
    return ""


def _place_lines(graph: Graph, lines: Sequence[_Line], total: float) -> tuple[float, list[str], list[str]]:
    """Gives every mark its y; the height, and the bands and numbers of the rows."""
    tall = [any(spot.label for spot in line.spots) for line in lines]
    heights = [_TALL if high else _LOW if line.spots else _GAP for high, line in zip(tall, lines, strict=True)]
    filled = max(1, sum(bool(line.spots) for line in lines))
    # Few lines stand farther apart, or edges would lie flat.
    apart = max(0.0, min(_MOST_APART, (_LEAST_HEIGHT - sum(heights)) / filled))
    y = 6.0
    rows: dict[int, tuple[float, float]] = {}
    for line, own, high in zip(lines, heights, tall, strict=True):
        height = own + (apart if line.spots and line.row else 0)
        above = high and line.row > graph.layers  # edges reach logits from below
        for spot in line.spots:
            spot.y, spot.label_y = y + (27 if above else 11), -11 if above else 21
        if line.spots:
            rows[line.row] = (rows.get(line.row, (y, y))[0], y + height)
        y += height
    bands = [
        f'<rect class="band" y="{top:.1f}" width="{total + _AXIS:.1f}" height="{bottom - top:.1f}"/>'
        for row, (top, bottom) in rows.items()
        if row % 2
    ]
    names = {0: "token", graph.layers + 1: "next"}
    ticks = [
        f'<text class="muted" x="{_AXIS - 8:g}" y="{top + 15:.1f}" text-anchor="end">{names.get(row, row - 1)}</text>'
        for row, (top, _) in rows.items()
    ]
    return y + 2, bands, ticks


def _strongest(graph: Graph, most: int) -> list[tuple[int, int, float, float]]:
    """Source, target, weight and share of the strength of the strongest edge, the weakest first."""
    sums: dict[int, float] = defaultdict(float)
    for _, target, weight in graph.edges:
        sums[target] += abs(weight)
    found = []
    for source, target, weight in graph.edges:
        node = graph.nodes[target]
        read = node.incoming or sums[target]
        found.append((abs(weight) / read * node.influence if read else 0.0, source, target, weight))
    found.sort(key=lambda each: -each[0])
    strongest = max([1e-12, *(each[0] for each in found[:1])])
    return [(source, target, weight, part / strongest) for part, source, target, weight in found[:most]][::-1]


def _edges(found: Iterable[tuple[int, int, float, float]], spots: dict[int, _Spot]) -> Iterable[str]:
    for source, target, weight, part in found:
        low, high, root = spots[source], spots[target], math.sqrt(part)
        y1, y2 = low.y - 7, high.y + 7
        rise = y1 - y2
        near = abs(low.x - high.x) < 12 and rise > 60
        aside = min(44, 10 + rise * 0.06) * (1 if source % 2 else -1) if near else 0
        pull = max(10, rise * 0.42)
        kind = "minus" if weight < 0 else "plus"
        yield (
            f'<path class="{kind}" stroke-width="{0.8 + 5 * root:.2f}" stroke-opacity="{0.18 + 0.62 * root:.2f}" '
            f'd="M{low.x:.1f} {y1:.1f}C{low.x + aside:.1f} {y1 - pull:.1f} {high.x + aside:.1f} {y2 + pull:.1f} '
            f'{high.x:.1f} {y2:.1f}"/>'
        )


def _mark(spot: _Spot) -> str:
    node = spot.node
    shape = _SHAPES.get(node.kind) or f'<circle class="feature g{min(2, node.group or 0)}" r="5.5"/>'
    if node.kind == "feature" and node.folded:
        shape = f'<circle class="ring" r="8.2"/>{shape}'
    label = ""
    if spot.label:
        label = f'<text class="label" y="{spot.label_y:g}" text-anchor="middle">{escape(spot.label)}</text>'
    where = "" if node.layer is None else f" of layer {node.layer}"
    name = f"{node.kind} {'' if node.feature is None else node.feature}".strip() + f"{where} at token {node.token}"
    said = f": {visible(node.text).strip()}" if node.text else ""
    if node.folded:
        said += f"; {number(node.folded)} folded in" if node.kind == "feature" else f"; {number(node.folded)} features"
    return f'<g transform="translate({spot.x:.1f} {spot.y:.1f})"><title>{escape(name + said)}</title>{shape}{label}</g>'


def _tokens(graph: Graph, columns: Sequence[_Column], height: float) -> Iterable[str]:
    for text, column in zip(graph.tokens, columns, strict=True):
        shown = _shorten(spaced(text), column.width)
        x = column.x + column.width / 2
        yield f'<text class="mono" x="{x:.1f}" y="{height + 17:.1f}" text-anchor="middle">{escape(shown)}</text>'


def _words(graph: Graph, marks: int, edges: int) -> tuple[str, str]:
    """Title and description of a graph of which so many nodes and edges are drawn."""
    prompt = visible("".join(graph.tokens))
    targets = ", ".join(_label(node) for node in graph.nodes if node.target)
    described = [
        f"Tokens from left to right, layers from below, next tokens on top: {targets}.",
        f"The {number(marks)} strongest of {number(len(graph.nodes))} nodes, and {number(edges)} of "
        f"{number(len(graph.edges))} edges.",
        "Circles are features, diamonds errors; blue raises, dashed orange lowers.",
    ]
    if graph.scores:
        last = graph.scores[-1]
        described.append(f"Replacement score {number(last.replacement)}, completeness {number(last.completeness)}.")
    return f"Attribution graph of: {prompt}", " ".join(described)


def _width(text: str) -> float:
    """A text's width at 11 px, rather too large: what is drawn elsewhere has other fonts."""
    return _CHARACTER * sum(
        2.0 if unicodedata.east_asian_width(c) in "WF" or c > "\U0001f000"
        else 1.5 if c in "MWmw@%␣⏎⋯"
        else 0.65 if c in "iljftr.,:;'|! ()[]"
        else 1.0
        for c in text
    )  # fmt: skip


def _shorten(text: str, width: float) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text) + 1.5 * _CHARACTER > width:
        text = text[:-1]
    return re.sub(r"\s+$", "", text) + "…"
