"""The run's report, of one layer or of all, and the files that it has beside it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from mtc.report.html import BROWSER_SLOT, FEATURE_SLOT
from mtc.results import LAYERS_REPORT, report_names
from serve.contract import ServiceError
from serve.http.media_types import HTML, JSON, MARKDOWN, media_type_of
from serve.http.pages import query
from serve.http.routes.common import BINARY, Model, TheService, errors, packed, wanted
from serve.service import ServedLayer, ServedRun

router = APIRouter(tags=["report"])

Layer = Annotated[
    int | None,
    Query(ge=0, lt=1 << 31, description="Layer of the run; by default a run of several is reported as a whole."),
]
Name = Annotated[str, Path(description="Name of a file of the report, such as `plots/loss.png`.")]
PAGE = (
    "sandbox allow-scripts allow-popups; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""For the report, which forbids all scripts but its own by their digest itself, and has no rights here."""
PICTURE = "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""For SVG files: their scripts do not run."""
_FORMS = {
    200: {
        "content": {
            HTML: {"schema": {"type": "string"}},
            MARKDOWN: {"schema": {"type": "string"}},
            JSON: {"schema": {}},
        }
    }
}
_FILES = ("application/octet-stream", HTML, MARKDOWN, JSON, "image/png", "image/svg+xml", "image/webp")


@router.get(
    "/report",
    response_class=Response,
    responses=errors(404, 406, 409, 422, 503) | _FORMS | {304: {"description": "It is the same."}},
)
async def report(request: Request, service: TheService, model: Model = None, layer: Layer = None) -> Response:
    """The report: Markdown, or HTML or JSON if the Accept header prefers it."""
    asked = await service.asked(model, layer)
    names = LAYERS_REPORT if isinstance(asked, ServedRun) else report_names(asked.number)
    forms = {MARKDOWN: names.markdown, HTML: names.html, JSON: names.json}
    media_type = wanted(request, tuple(forms))
    headers = {"Vary": "Accept, Accept-Encoding"} | ({"Content-Security-Policy": PAGE} if media_type == HTML else {})
    answer = await _file(request, asked, forms[media_type], media_type, headers)
    if answer.status_code != 200:
        return answer
    body, headers = bytes(answer.body), headers | {"ETag": answer.headers["ETag"]}
    if media_type == HTML:
        body = await asyncio.to_thread(_with_links, asked, body)
    return await packed(request, body, media_type, headers)


@router.get(
    "/report/files/{name:path}",
    response_class=Response,
    responses=errors(404, 409, 422, 503)
    | {200: {"content": dict.fromkeys(_FILES, BINARY)}, 304: {"description": "It is the same."}},
)
async def report_file(
    request: Request, service: TheService, name: Name, model: Model = None, layer: Layer = None
) -> Response:
    """A file of the report, such as a plot."""
    asked = await service.asked(model, layer)
    media_type = media_type_of(name)
    headers = {"image/svg+xml": {"Content-Security-Policy": PICTURE}, HTML: {"Content-Security-Policy": PAGE}}
    return await _file(request, asked, name, media_type, headers.get(media_type, {}))


async def _file(
    request: Request, asked: ServedRun | ServedLayer, name: str, media_type: str, headers: dict[str, str]
) -> Response:
    run, place = (asked, "") if isinstance(asked, ServedRun) else (asked.run, asked.place)
    name = f"{place}report/{name}"
    # The manifest's names are the only ones, so that no path leads out of the run.
    entry = run.manifest.files.get(name)
    if entry is None:
        raise ServiceError(404, "not_found", f"run {run.key.run_id} has no file {name[:200]!r}")
    tag = f'"{entry.sha256}"'
    headers |= {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(await run.report_file(name), media_type=media_type, headers=headers)


def _with_links(asked: ServedRun | ServedLayer, page: bytes) -> bytes:
    """The page with links to the feature browser, and of all layers with this service's reports of each, where it has
    files in the run's directory."""
    run, own = (asked, asked.default) if isinstance(asked, ServedRun) else (asked.run, asked)
    for layer, each in run.layers.items():
        file = f'href="../{each.place}report/{report_names(layer).html}"'
        page = page.replace(file.encode(), f'href="{_address("/report", run, layer)}"'.encode())
    if own.has_analysis:
        browser = f'<p><a href="{_address("/ui/features", run, own.number)}">Feature browser</a></p>'
        page = page.replace(BROWSER_SLOT.encode(), browser.encode(), 1)
        if own is asked:
            page = FEATURE_SLOT.sub(lambda found: _link(run, own.number, *found.groups()), page.decode()).encode()
    return page


def _link(run: ServedRun, layer: int, feature: str, text: str) -> str:
    address = _address(f"/ui/feature/{feature}", run, layer)
    return f'<a data-feature="{feature}" href="{address}">{text or f"Feature {feature} in the feature browser"}</a>'


def _address(path: str, run: ServedRun, layer: int) -> str:
    several = len(run.layers) > 1
    return path + query(model=run.key.run_id, layer=layer if several else None).replace("&", "&amp;")
