"""What a report is made of, before it is Markdown or HTML: sections of blocks of text.

Both forms are rendered from the same blocks, so that they show the same figures. A text is a piece or a tuple of
pieces; plain strings and tokens may hold anything (they come from other people's documents) and are escaped by
whoever renders them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from mtc.results import Example, Finding


@dataclass(frozen=True)
class Token:
    """A decoded token, its spaces shown."""

    text: str


@dataclass(frozen=True)
class Label:
    """What a feature's examples have in common, in words that quote tokens."""

    text: str


@dataclass(frozen=True)
class FeatureLink:
    """A feature's number, which leads to its card if there is one."""

    feature: int
    massive: bool = False
    """Whether the feature is of massive tokens, which a badge tells; see `with_badges`."""


@dataclass(frozen=True)
class Code:
    """A name from the configuration or the code."""

    text: str


@dataclass(frozen=True)
class Link:
    """Leads to a file beside the report, or with `#` in front to a place in it."""

    text: str
    target: str


Piece = str | Token | Label | FeatureLink | Code | Link
Text = Piece | tuple[Piece, ...]


@dataclass(frozen=True)
class Heading:
    """Heading of a part of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: Text


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Text, ...]


@dataclass(frozen=True)
class Branch:
    """A line of a tree and the lines that hang on it."""

    text: Text
    twigs: tuple[Text, ...]


@dataclass(frozen=True)
class Branches:
    """A tree of two levels."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first cell of a row names it."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    folded: bool = False
    """Whether the table is shown on demand, where that is possible."""
    searchable: bool = False
    """Whether rows are sorted and filtered on demand, where that is possible."""


@dataclass(frozen=True)
class KeyFigure:
    """A figure of the run that is seen first."""

    label: str
    value: str
    note: str
    """The figure's interval, or what it is held against."""


@dataclass(frozen=True)
class KeyFigures:
    """The figures of the run that are seen first."""

    caption: str
    figures: tuple[KeyFigure, ...]


@dataclass(frozen=True)
class Plots:
    """Pictures side by side, by their names in mtc.results.files.PLOTS, with a text for those who do not see them."""

    plots: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bars:
    """A small histogram with borders on a logarithmic scale."""

    caption: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    mark: float | None = None
    """A value whose place among the others is shown."""


@dataclass(frozen=True)
class Contexts:
    """Places in the text where a feature fires."""

    examples: tuple[Example, ...]
    strongest: float
    """The feature's strongest activation, for which the marks are darkest."""


@dataclass(frozen=True)
class Findings:
    """What rules say about the run: insights or recommendations."""

    findings: tuple[Finding, ...]
    advice: bool
    """Whether the findings are recommendations."""


@dataclass(frozen=True)
class Card:
    """All about one feature."""

    feature: int
    title: str
    summary: Text
    """The feature's figures in one line."""
    blocks: tuple[Block, ...]


Block = (
    Heading | Paragraph | Items | Branches | Table | KeyFigures | Plots | Bars | Contexts | Findings | Card
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A numbered part of the report."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The section's name in links."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Document:
    """A whole report as blocks, before it is Markdown or HTML."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    provenance: Section
    """Where the figures come from, as the report's last section."""
    stamp: str
    """Where the figures come from in one line, for the foot of printed pages."""


def with_badges(content: Any, massive: Collection[int]) -> Any:
    """Blocks, sections or texts with a badge at each link to one of the `massive` features."""
    if isinstance(content, FeatureLink):
        return replace(content, massive=content.feature in massive)
    if isinstance(content, tuple):
        return tuple(with_badges(part, massive) for part in content)
    if is_dataclass(content) and not isinstance(content, type):
        return replace(content, **{f.name: with_badges(getattr(content, f.name), massive) for f in fields(content)})
    return content
