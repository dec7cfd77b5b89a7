"""Media types of answers: what a client accepts and what a file is."""

from __future__ import annotations

import mimetypes
import posixpath

MARKDOWN, HTML, JSON = "text/markdown", "text/html", "application/json"


def negotiate(accept: str, offered: list[str]) -> str | None:
    """The best of the `offered` media types for an Accept header, earlier ones winning ties; None if none will do.

    Parameters other than q are not looked at: clients send `application/json; charset=utf-8`, which werkzeug's
    `MIMEAccept.best_match` would refuse.
    """
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_range, *parameters = [p.strip().lower() for p in part.split(";")]
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            weights[media_range] = float(quality)
        except ValueError:
            weights[media_range] = 0.0

    def weight(media_type: str) -> float:
        ranges = [media_type, media_type.split("/")[0] + "/*", "*/*"]
        return next((weights[r] for r in ranges if r in weights), 0.0)  # the most specific range decides

    best = max(offered, key=weight)
    return best if weight(best) > 0 else None


def media_type_of(name: str) -> str:
    # Not the system's table alone: slim images lack it, and Python 3.11's has no WebP.
    known = {".md": MARKDOWN, ".jsonl": "application/jsonl", ".webp": "image/webp"}
    return known.get(posixpath.splitext(name)[1]) or mimetypes.guess_type(name)[0] or "application/octet-stream"
