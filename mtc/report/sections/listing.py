"""Pieces of text that several sections show alike."""

from __future__ import annotations

from mtc.report.blocks import Piece, Token


def listed(parts: list[tuple[Piece, ...]]) -> tuple[Piece, ...]:
    """Texts in a row, with commas between them."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += [", ", *part] if pieces else part
    return tuple(pieces)


def maybe_token(text: str | None) -> Piece:
    return "no samples" if text is None else Token(text)
