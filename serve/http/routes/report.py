"""The run's report, of one layer or of all, and the files that it has beside it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from mtc.results import LAYERS_REPORT, report_names
from serve.contract import ServiceError
from serve.http.media_types import HTML, JSON, MARKDOWN, media_type_of
from serve.http.pages import query
from serve.http.routes.common import BINARY, Model, TheService, errors, wanted
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
    headers = {"Vary": "Accept"} | ({"Content-Security-Policy": PAGE} if media_type == HTML else {})
    answer = await _file(request, asked, forms[media_type], media_type, headers)
    if media_type == HTML and isinstance(asked, ServedRun) and answer.status_code == 200:
        body = _with_links(asked, bytes(answer.body))
        return Response(body, media_type=media_type, headers=headers | {"ETag": answer.headers["ETag"]})
    return answer


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
    return Response(await asyncio.to_thread(run.read, name), media_type=media_type, headers=headers)


def _with_links(run: ServedRun, page: bytes) -> bytes:
    """The page, whose links to the layers' reports are of files in the run's directory, with this service's."""
    for layer, own in run.layers.items():
        file = f'href="../{own.place}report/{report_names(layer).html}"'
        here = f'href="/report{query(model=run.key.run_id, layer=layer)}"'
        page = page.replace(file.encode(), here.replace("&", "&amp;").encode())
    return page
