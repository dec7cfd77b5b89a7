"""A document as one HTML page that needs nothing outside itself: styles, script and plots are inside.

A content security policy forbids the page to load anything and to run any script but its own. All text passes
`visible` (control characters become signs) and Jinja's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mtc.report import blocks
from mtc.report.format import spaced, visible
from mtc.report.markdown import bars_in_words, context_note
from mtc.report.palette import GREY, INK, PAPER
from mtc.results import NOT_MEASURED, number

_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( %)?( to [-+]?[\d,.]+(e[-+]?\d+)?( %)?)?|–|undefined")
STRENGTHS = 5
"""Shades of the marks on the tokens of a context."""
BADGE = Markup(' <span class="badge" title="most of its activation falls on massive tokens">massive</span>')
"""What stands behind a feature of massive tokens."""
BROWSER_SLOT = "<span data-browser></span>"
"""Where a browser of the run's features puts the link to itself."""
FEATURE_SLOT = re.compile(r'<a data-feature="(\d+)">(\d*)</a>')
"""Where it links to a feature, whose number is what the link says, or nothing in the feature's card."""
_QUOTED = re.compile(r"""(?<![^\s(])(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?![^\s,;:.)…])""")
"""A token or phrase as labels quote it: a Python literal between spaces or brackets. No apostrophe begins one."""
_MOST_UNBROKEN = 26
"""Characters up to which a quoted token stays on one line: those of a token that a label does not cut."""
_BAR_WIDTH, _BAR_HEIGHT = 14, 60


def render_html(document: blocks.Document, pictures: Mapping[str, str]) -> str:
    """The document as one HTML page; `pictures` are the plots' SVG texts by name."""
    parts = [block for section in document.sections for block in section.blocks]
    cards = {block.feature for block in parts if isinstance(block, blocks.Card)}
    page = environment().get_template("page.html")
    style = Markup(template_text("report.css") + _print_foot(document.stamp))
    script = Markup(template_text("report.js"))
    renderer = Renderer(lambda feature: f"#feature-{feature}" if feature in cards else None, pictures)
    return page.render(
        document=document, style=style, script=script, style_hash=content_hash(style), script_hash=content_hash(script),
        render=renderer.block, text=renderer.text, browser=Markup(BROWSER_SLOT),
    )  # fmt: skip


def label(text: str) -> Markup:
    """A feature's label, which does not break inside its quoted tokens at the end of a line."""
    shown = visible(text)
    parts, end = [], 0
    for quoted in _QUOTED.finditer(shown):
        if len(quoted[0]) <= _MOST_UNBROKEN and " " in quoted[0]:
            parts += [escape(shown[end : quoted.start()]), Markup('<span class="quoted">{}</span>').format(quoted[0])]
            end = quoted.end()
    return Markup('<span class="label">{}</span>').format(Markup("").join([*parts, escape(shown[end:])]))


class Renderer:
    """Renders blocks as HTML, with what they refer to.

    Args:
        link: the address of what is said of a feature, None if nothing is.
        pictures: the plots' SVG texts by name.
    """

    def __init__(self, link: Callable[[int], str | None], pictures: Mapping[str, str] | None = None):
        self._macros: Any = environment().get_template("blocks.html").make_module(
            {"text": self.text, "render": self.block, "plot": self._plot, "places": self._places,
             "marked": self._marked, "in_words": bars_in_words, "note": context_note, "numeric": _numeric,
             "advice": _advice, "slot": _slot}
        )  # fmt: skip
        self._pictures, self._link = pictures or {}, link

    def block(self, block: blocks.Block) -> Markup:
        """A block rendered by the macro that bears its name."""
        return Markup(getattr(self._macros, type(block).__name__.lower())(block))

    def text(self, text: blocks.Text) -> Markup:
        if isinstance(text, tuple):
            return Markup("").join(self.text(piece) for piece in text)
        match text:
            case blocks.Token():
                return Markup('<span class="token">{}</span>').format(spaced(text.text))
            case blocks.Label():
                return label(text.text)
            case blocks.FeatureLink():
                address = self._link(text.feature)
                name = escape(str(text.feature))
                link = (
                    _slot(text.feature, name)
                    if address is None
                    else Markup('<a href="{}">{}</a>').format(address, name)
                )
                return link + BADGE if text.massive else link
            case blocks.Code():
                return Markup("<code>{}</code>").format(visible(text.text))
            case blocks.Link():
                return Markup('<a href="{}">{}</a>').format(text.target, visible(text.text))
            case _:
                return Markup("{}").format(visible(text))

    def _plot(self, name: str, alternative: str) -> Markup:
        return Markup(inline_svg(self._pictures[name], f"plot-{name}", alternative))

    def _places(self, block: blocks.Bars) -> dict[str, Any]:
        """Places of a histogram's bars and ticks: one empty bin on either side of those that are filled."""
        filled = [i for i, count in enumerate(block.counts) if count]
        if not filled:
            return {}
        first, last = max(0, filled[0] - 1), min(len(block.counts), filled[-1] + 2)
        tallest = max(block.counts)
        bars = [
            {"x": 1 + (i - first) * _BAR_WIDTH, "height": round(_BAR_HEIGHT * block.counts[i] / tallest, 2),
             "label": f"{number(block.edges[i])} to {number(block.edges[i + 1])}: {number(block.counts[i])}"}
            for i in range(first, last)
        ]  # fmt: skip
        # A label at every other border would touch its neighbours.
        ticks = [
            {"x": 1 + (i - first) * _BAR_WIDTH, "label": number(block.edges[i])} for i in range(first, last + 1, 4)
        ]
        width = (last - first) * _BAR_WIDTH
        mark = None
        if block.mark is not None:
            at = np.interp(np.log(block.mark), np.log(block.edges), np.arange(len(block.edges)))
            mark = round(1 + (float(at) - first) * _BAR_WIDTH, 1)
        return {
            "bars": bars, "ticks": ticks, "width": width, "tallest": number(tallest), "height": _BAR_HEIGHT,
            "mark": mark,
        }  # fmt: skip

    def _marked(self, example: blocks.Example, strongest: float) -> Markup:
        """A context's text, marked where the feature fires: the stronger, the darker; the peak is bold."""
        parts = []
        for i, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True)):
            if value <= 0 and i != example.peak:
                parts.append(Markup("{}").format(visible(token)))
                continue
            step = min(STRENGTHS, max(1, round(STRENGTHS * value / strongest))) if strongest > 0 else 1
            shown = visible(token) if token.strip() else spaced(token)
            template = Markup('<{0} class="a{1}" title="activation {2}">{3}</{0}>')
            parts.append(template.format("b" if i == example.peak else "span", step, number(value), shown))
        return Markup("").join(parts)


def _slot(feature: int, text: str = "") -> Markup:
    return Markup('<a data-feature="{}">{}</a>').format(feature, text)


def inline_svg(svg: str, name: str, alternative: str) -> str:
    """A plot's SVG for a page: the page's colours, ids of its own, a text for those who do not see it.

    It has no style element, which would hold for the whole page.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, replacement in ((INK, "currentColor"), (PAPER, "var(--paper)"), (GREY, "var(--muted)")):
        body = body.replace(colour, replacement)
    opening = re.match(r"<svg[^>]*>", body)
    assert opening
    box = re.search(r'viewBox="([^"]+)"', opening[0])
    assert box
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box[1], visible(alternative))
    return str(head) + re.sub(r">\s+<", "><", body[opening.end() :]).strip()


@cache
def template_text(name: str) -> str:
    """A style or script of the pages."""
    return (resources.files("mtc.report") / "templates" / name).read_text()


@cache
def environment() -> Environment:
    """Of the pages' templates."""
    made = Environment(
        loader=PackageLoader("mtc.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"visible": visible, "number": number}
    return made


def content_hash(text: str) -> str:
    """The digest of a style or script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _print_foot(stamp: str) -> str:
    """Style that puts the provenance on every printed page; every character but letters and digits as its code."""
    safe = "".join(c if c.isascii() and c.isalnum() else f"\\{ord(c):x} " for c in visible(stamp))
    return f'@page {{ @bottom-left {{ content: "{safe}"; }} }}\n'


def _numeric(table: blocks.Table) -> list[bool]:
    """Which columns of a table hold numbers, and go to the right."""

    def is_number(cell: blocks.Text) -> bool:
        return isinstance(cell, str) and (cell == NOT_MEASURED or _NUMBER.fullmatch(cell) is not None)

    return [
        bool(table.rows)
        and all(is_number(row[i]) for row in table.rows)
        and any(row[i] != NOT_MEASURED for row in table.rows)
        for i in range(len(table.headers))
    ]


def _advice(text: str) -> blocks.Text:
    """A rule's text, in which backticks stand around fields of the configuration."""
    return tuple(blocks.Code(part) if i % 2 else part for i, part in enumerate(text.split("`")))
