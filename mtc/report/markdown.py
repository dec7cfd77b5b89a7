"""A document as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtc.report import blocks
from mtc.report.format import context, escape, spaced, table
from mtc.results import number


def render_markdown(document: blocks.Document, pictures: Mapping[str, str]) -> str:
    """The document as Markdown; `pictures` are the plots' files by name."""
    parts = [f"# {escape(document.title)}", escape(document.subtitle)]
    for i, section in enumerate(document.sections, 1):
        parts += [f"## {i}. {escape(section.title)}", *render_blocks(section.blocks, pictures)]
    parts += [f"## {escape(document.provenance.title)}", *render_blocks(document.provenance.blocks, pictures)]
    return "\n\n".join(parts) + "\n"


def render_blocks(parts: Sequence[blocks.Block], pictures: Mapping[str, str]) -> list[str]:
    """Blocks as paragraphs of Markdown."""
    return [line for block in parts for line in _RENDERERS[type(block)](block, pictures)]


def bars_in_words(block: blocks.Bars) -> str:
    """A histogram in words: the bins that are not empty, with their counts."""
    filled = [
        f"{number(block.edges[i])} to {number(block.edges[i + 1])}: {number(count)}"
        for i, count in enumerate(block.counts)
        if count
    ]
    return "; ".join(filled) or "none"


def context_note(example: blocks.Example) -> str:
    """What stands beside a context: its activation and where it is from."""
    kind = "" if example.quantile is None else f", quantile {number(example.quantile)}"
    place = "" if example.position is None else f", {place_in_window(example.position)}"
    return f"{number(example.activation)}{kind}{place}, document {example.document_id}"


def place_in_window(position: int) -> str:
    """Where in its window a token stands, and whether the language model saw anything before it."""
    return f"position {number(position)}" + (" (next to nothing before it)" if position <= 1 else "")


def _text(text: blocks.Text) -> str:
    if isinstance(text, tuple):
        return "".join(_text(piece) for piece in text)
    match text:
        case blocks.Token():
            return escape(spaced(text.text))
        case blocks.Label():
            return escape(text.text)
        case blocks.FeatureLink():
            return f"{text.feature} (massive)" if text.massive else str(text.feature)
        case blocks.Code():
            return f"`{text.text}`"
        case blocks.Link():
            return escape(text.text) if text.target.startswith("#") else f"[{escape(text.text)}]({text.target})"
        case _:
            return escape(text)


def _heading(block: blocks.Heading, pictures: Mapping[str, str]) -> list[str]:
    return [f"### {escape(block.text)}"]


def _paragraph(block: blocks.Paragraph, pictures: Mapping[str, str]) -> list[str]:
    return [_text(block.text)]


def _items(block: blocks.Items, pictures: Mapping[str, str]) -> list[str]:
    return ["\n".join(f"- {_text(item)}" for item in block.items)]


def _branches(block: blocks.Branches, pictures: Mapping[str, str]) -> list[str]:
    lines = []
    for branch in block.branches:
        lines += [f"- {_text(branch.text)}", *(f"  - {_text(twig)}" for twig in branch.twigs)]
    return ["\n".join(lines)]


def _table(block: blocks.Table, pictures: Mapping[str, str]) -> list[str]:
    rows = [[_text(cell) for cell in row] for row in block.rows]
    return [f"**{escape(block.caption)}**", table([escape(h) for h in block.headers], rows)]


def _key_figures(block: blocks.KeyFigures, pictures: Mapping[str, str]) -> list[str]:
    rows = [[escape(f.label), escape(f.value), escape(f.note)] for f in block.figures]
    return [f"**{escape(block.caption)}**", table(["Figure", "Value", "Note"], rows)]


def _plots(block: blocks.Plots, pictures: Mapping[str, str]) -> list[str]:
    return [f"![{escape(text)}]({pictures[name]})" for name, text in block.plots]


def _bars(block: blocks.Bars, pictures: Mapping[str, str]) -> list[str]:
    return [f"{escape(block.caption)}: {escape(bars_in_words(block))}"]


def _contexts(block: blocks.Contexts, pictures: Mapping[str, str]) -> list[str]:
    return [
        "\n".join(
            f"{i}. {context(e.tokens, e.peak)} ({escape(context_note(e))})" for i, e in enumerate(block.examples, 1)
        )
    ]


def _findings(block: blocks.Findings, pictures: Mapping[str, str]) -> list[str]:
    lines = []
    for f in block.findings:
        state = "" if block.advice else f", threshold {number(f.threshold)}: {'met' if f.met else 'not met'}"
        lines.append(f"- {f.text} Rule *{f.rule}*: {escape(f.condition)}; measured {number(f.value)}{state}.")
    return ["\n".join(lines)] if lines else []


def _card(block: blocks.Card, pictures: Mapping[str, str]) -> list[str]:
    return [f"#### {escape(block.title)}", *render_blocks(block.blocks, pictures)]


_RENDERERS: dict[type, Callable[[Any, Mapping[str, str]], list[str]]] = {
    blocks.Heading: _heading,
    blocks.Paragraph: _paragraph,
    blocks.Items: _items,
    blocks.Branches: _branches,
    blocks.Table: _table,
    blocks.KeyFigures: _key_figures,
    blocks.Plots: _plots,
    blocks.Bars: _bars,
    blocks.Contexts: _contexts,
    blocks.Findings: _findings,
    blocks.Card: _card,
}
