"""The colours of the report's plots that pages replace."""

from __future__ import annotations

INK, PAPER, GREY = "#1b1f24", "#fffffe", "#66686c"
