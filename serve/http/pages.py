"""What browsers get: templates as pages, the files that pages load, and errors that a person can read.

Pages load nothing from elsewhere, and no script or style runs that is not one of the files here.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse
from starlette.types import Scope

from mtc.report.format import spaced, visible
from mtc.report.graph_page import GRAPH_SCRIPTS, GRAPH_STYLES
from mtc.report.html import label
from mtc.results import number, percent
from serve.http.media_types import media_type_of

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # Without any referrer, browsers would not say where a form was sent from.
    "Referrer-Policy": "same-origin",
}
"""Of every page here; the report has its own, see serve/http/routes/report.py."""
_PAGES = re.compile(r"/(ui(/(?!static/).*)?|docs|report|graph/[^/]+/result)", re.DOTALL)
_TITLES = {
    401: "An API key is needed", 403: "Not allowed", 404: "Not found", 409: "This cannot be shown",
    422: "That does not fit", 429: "Too much at once", 502: "Not now", 503: "Not now",
}  # fmt: skip
_KINDS = {"not_done": "Not done yet", "no_interventions": "Not served here"}


class StaticFile(NamedTuple):
    """A file that pages load."""

    data: bytes
    media_type: str
    tag: str
    """For ETag."""


def wants_page(scope: Scope) -> bool:
    """Whether a request comes from someone who looks at pages."""
    accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return b"text/html" in accept and _PAGES.fullmatch(scope["path"]) is not None


def render(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> HTMLResponse:
    """A template of serve/ui as a page; all values are escaped."""
    text = _environment().get_template(template).render(**values)
    return HTMLResponse(text, status, HEADERS | (headers or {}))


def error_page(
    status: int, error_type: str, message: str, request_id: str, headers: dict[str, str] | None
) -> HTMLResponse:
    """An error for a person; a run that is being loaded is asked for again."""
    again = {"Refresh": "2"} if error_type == "loading" else {}
    title = _KINDS.get(error_type) or _TITLES.get(status, "Something went wrong")
    values = {"title": title, "message": message, "request_id": request_id, "waiting": bool(again)}
    return render("error.html", status, (headers or {}) | again, **values)


def query(**values: Any) -> str:
    """`?a=b` of the values that are given; nothing if there are none."""
    given = {name: value for name, value in values.items() if value not in (None, "", [])}
    return f"?{urlencode(given, doseq=True)}" if given else ""


@cache
def static_files() -> dict[str, StaticFile]:
    """All files that pages load, by name; there are no others. The report's style is theirs, too, and its graphs."""
    templates = resources.files("mtc.report") / "templates"
    found: dict[str, Traversable] = {name: templates / name for name in (*GRAPH_STYLES, *GRAPH_SCRIPTS)}
    _collect(resources.files("serve") / "ui" / "static", "", found)
    return {name: _static(name, file.read_bytes()) for name, file in found.items()}


def _static(name: str, data: bytes) -> StaticFile:
    media_type = media_type_of(name)
    if media_type.startswith("text/"):
        media_type += "; charset=utf-8"
    return StaticFile(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _collect(directory: Traversable, prefix: str, found: dict[str, Traversable]) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            _collect(entry, f"{prefix}{entry.name}/", found)
        else:
            found[prefix + entry.name] = entry


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("serve", "ui/templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"visible": visible, "spaced": spaced, "label": label, "number": number, "percent": percent}
    environment.globals |= {"query": query}
    return environment
