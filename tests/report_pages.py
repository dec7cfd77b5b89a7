"""Reads rendered reports back, without the code that wrote them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import NamedTuple

Rows = list[list[str]]


class Page(NamedTuple):
    """What a reader sees."""

    tables: list[tuple[str, Rows]]
    """Caption and rows of cells, headers first, in the order of the page."""
    items: list[str]
    """List items, those inside others apart."""
    headings: list[tuple[int, str]]
    """Level and text."""
    text: str
    """All of it."""

    def table(self, start: str, n: int = 0) -> Rows:
        """The n-th table whose caption begins so."""
        return [rows for caption, rows in self.tables if caption.startswith(start)][n]


def plain(markdown: str) -> str:
    """Markdown's inline marks and escapes removed."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"(?<!\\)(\*\*|\*|`)|</?b>", "", text)
    text = re.sub(r"\\([\\`*_\[\]#|~$])", r"\1", text)
    return squeeze(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def squeeze(text: str) -> str:
    return " ".join(text.split())


def read_markdown(markdown: str) -> Page:
    """Fails if a row has another number of cells than its header."""
    page = Page([], [], [], markdown)
    previous, caption = "", ""
    for line in markdown.split("\n"):
        if line.startswith("|"):
            if not previous.startswith("|"):
                page.tables.append((plain(caption), []))
            if not set(line) <= set("|- "):
                page.tables[-1][1].append([plain(c) for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif match := re.match(r"(#+) (.*)", line):
            page.headings.append((len(match[1]), plain(match[2])))
        elif match := re.match(r" *(?:-|\d+\.) (.*)", line):
            page.items.append(plain(match[1]))
        if line.strip() and not line.startswith("|"):
            caption = line
        previous = line
    for _, rows in page.tables:
        assert {len(r) for r in rows} == {len(rows[0])}
    return page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page([], [], [], "")
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.targets += [v for k, v in attrs if k in ("href", "xlink:href") and v]
        if tag == "table":
            self.page.tables.append(("", []))
        elif tag == "tr":
            self.page.tables[-1][1].append([])
        elif tag == "ul" and self._open and self._open[-1][0] == "li":
            self._close()  # a list inside an item ends the item's own text
            self._open.append(("done", []))
        if tag in ("caption", "th", "td", "li", "style", "script", "svg") or re.fullmatch("h[1-6]", tag):
            self._open.append((tag, []))

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][1].append(data)
        self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] in (tag, "done" if tag == "li" else tag):
            self._close()

    def _close(self) -> None:
        tag, parts = self._open.pop()
        text = squeeze("".join(parts))
        if tag == "caption":
            self.page.tables[-1] = (text, self.page.tables[-1][1])
        elif tag in ("th", "td"):
            self.page.tables[-1][1][-1].append(text)
        elif tag == "li":
            self.page.items.append(text)
        elif tag[0] == "h":
            self.page.headings.append((int(tag[1]), text))


def read_html(html: str) -> tuple[Page, list[str], list[str]]:
    """The page, its ids, and what its links lead to."""
    reader = _Reader()
    reader.feed(html)
    return reader.page._replace(text=squeeze("".join(reader.words))), reader.ids, reader.targets


def without_links(page: bytes) -> bytes:
    """The report's page as the file has it: what the service puts into it starts with an address of its own."""
    page = re.sub(rb'<p><a href="/ui/features[^<]*</a></p>', b"<span data-browser></span>", page)
    page = re.sub(rb'(<a data-feature="\d+") href="[^"]*">Feature \d+ in the feature browser<', rb"\1><", page)
    return re.sub(rb'(<a data-feature="\d+") href="[^"]*"', rb"\1", page)
