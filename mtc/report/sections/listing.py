"""Pieces of text that several sections show alike."""

from __future__ import annotations

from mtc.report.blocks import Label, Piece


def listed(parts: list[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """Texts in a row, with commas between them."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += [", ", *part] if pieces else part
    return tuple(pieces)


def maybe_label(text: str | None) -> Piece:
    """A feature's label, or that it has none."""
    return "no samples" if text is None else Label(text)
