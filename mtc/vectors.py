"""Vectors of texts from an OpenAI-compatible endpoint (`POST .../embeddings`): what is asked, and what of an answer is
taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATH = "/embeddings"
"""Where vectors are asked for, behind what OpenAI's clients call the base URL."""
MOST_DIMENSIONS = 8192
LARGEST = 16_000_000
"""Bytes above which an answer is not read to its end: 64 vectors of the most dimensions have fewer."""


class UnusableVectors(ValueError):
    """An answer without the vectors that were asked for; the message is the reason in a few words."""


def question(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """The body that asks for the vectors of some texts."""
    return {"model": model, "input": list(texts)}


def read_vectors(content: bytes, count: int) -> tuple[NDArray[np.float32], int | None]:
    """The vectors of an answer, [count, dimensions] of length 1 in the order of the texts, and how many tokens the
    endpoint counted, if it did. Raises UnusableVectors."""
    try:
        answer = json.loads(content)
        rows = sorted(answer["data"], key=lambda row: row["index"])
        places, vectors = [row["index"] for row in rows], [row["embedding"] for row in rows]
        tokens = (answer.get("usage") or {}).get("prompt_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UnusableVectors("unreadable") from None
    if places != list(range(count)):
        raise UnusableVectors(f"{len(places)} vectors of {count} texts, or not in their places")
    if not all(isinstance(vector, list) and set(map(type, vector)) <= {int, float} for vector in vectors):
        raise UnusableVectors("vectors of what is no number")
    if len({len(vector) for vector in vectors}) != 1 or not 0 < len(vectors[0]) <= MOST_DIMENSIONS:
        raise UnusableVectors(f"vectors of no, of unlike or of more than {MOST_DIMENSIONS} dimensions")
    try:
        found = np.array(vectors, np.float64)
    except OverflowError:
        raise UnusableVectors("vectors that have no direction") from None
    if not np.isfinite(found).all() or not found.any(1).all():
        raise UnusableVectors("vectors that have no direction")
    found /= np.abs(found).max(1, keepdims=True)  # so that no square overflows
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / length).astype(np.float32), tokens if type(tokens) is int and tokens >= 0 else None
