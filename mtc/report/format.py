"""How numbers and decoded tokens are written, in one place, so that every part of the report shows the same text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from mtc.results import percent

_VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: "\\" + c for c in "\\`*_[]#|~$"}


def share(value: float | None) -> str:
    """A share of the loss that an ablation costs; None where it costs none (LossRecovered.share_of_zero)."""
    return "says nothing" if value is None else percent(value)


def visible(text: str) -> str:
    """Text on one line: line breaks and tabs become signs, other control and format characters their code point.

    Those could reorder or hide what follows.
    """
    parts = []
    for character in text:
        if character in _VISIBLE and character != " ":
            parts.append(_VISIBLE[character])
        elif unicodedata.category(character)[0] == "C" or unicodedata.category(character) in ("Zl", "Zp"):
            parts.append(f"U+{ord(character):04X}")
        else:
            parts.append(character)
    return "".join(parts)


def spaced(text: str) -> str:
    """One decoded token for a list or table: visible, its spaces too, so that `the` and ` the` differ; ⋯ for
    one without text, within a character of several tokens."""
    return visible(text).replace(" ", _VISIBLE[" "]) if text else "⋯"


def short_label(text: str) -> str:
    """A feature's label for where there is little room: visible, without its shares, and without saying that there is
    no single token where it says more."""
    without_shares = re.sub(r" \((\d+ %|\d of \d)\)", "", visible(text))
    return re.sub(r"^no single token; (most often )?", "", without_shares).strip()


def escape(text: str) -> str:
    """Text that Markdown shows literally, on one line, inside a table cell or outside."""
    return "".join(_ENTITIES.get(character, character) for character in visible(text))


def token(text: str) -> str:
    """One decoded token in Markdown."""
    return escape(spaced(text))


def context(tokens: Sequence[str], peak: int) -> str:
    """Running text with the token at index `peak` in bold."""
    before, word, after = "".join(tokens[:peak]), tokens[peak], "".join(tokens[peak + 1 :])
    core = word.strip()
    if core:
        start = word.index(core)
        before, after = before + word[:start], word[start + len(core) :] + after
    # Asterisks next to punctuation inside a word are not read as bold.
    plain = core[:1].isalnum() and core[-1:].isalnum()
    marked = f"**{escape(core)}**" if plain else f"<b>{escape(core) if core else token(word)}</b>"
    return f"… {escape(before)}{marked}{escape(after)} …"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are already escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
