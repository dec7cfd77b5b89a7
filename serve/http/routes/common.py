"""What the routes share."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections import Counter
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Query, Request, Response

from serve.contract import ErrorResponse, ServiceError
from serve.http.errors import repeated
from serve.http.media_types import negotiate
from serve.service import Service

_LISTS = {"feature"}
"""Parameters that may be given several times."""
_GZIP = re.compile(r"(^|,)\s*(gzip|\*)\s*(;\s*q=(?!0(\.0*)?\s*(,|$))[\d.]+\s*)?(,|$)")
"""In Accept-Encoding of those who take gzip."""
BINARY = {"schema": {"type": "string", "format": "binary"}}


async def _service(request: Request) -> Service:  # not a plain function: FastAPI would run it in a thread
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
Model = Annotated[
    str | None, Query(min_length=1, max_length=200, description="Id of a run; by default the current one.")
]
Layer = Annotated[int | None, Query(ge=0, lt=1 << 31, description="Layer of the run; by default its lowest.")]


async def own_method(request: Request) -> None:
    """Raises HTTPException 405 where a path of its own words, such as /features/by-text, has another method, and only
    fits the template of this route."""
    methods = request.app.state.allowed(request.url.path)
    if methods and request.method not in methods:
        raise HTTPException(405, headers={"Allow": ""})  # which the answer fills in


async def single_parameters(request: Request) -> None:
    """Raises ServiceError 422 for a parameter that is given twice, of which one would not be read."""
    names = Counter(name for name, _ in request.query_params.multi_items() if name not in _LISTS)
    if twice := sorted(name[:100] for name, times in names.items() if times > 1):
        raise repeated(twice)


def request_id_of(request: Request) -> str:
    found: str = request.scope["state"]["request_id"]
    return found


def wanted(request: Request, offered: tuple[str, ...]) -> str:
    """The best media type for the request's Accept header; raises ServiceError 406 if none will do."""
    accept = ", ".join(request.headers.getlist("accept")) or "*/*"
    media_type = negotiate(accept, list(offered))
    if media_type is None:
        message = f"this is answered as {', '.join(offered)}, not as {accept[:200]}"
        raise ServiceError(406, "not_acceptable", message, {"offered": list(offered)})
    return media_type


def takes_gzip(request: Request) -> bool:
    """Whether an answer may be compressed."""
    return _GZIP.search(request.headers.get("accept-encoding", "").lower()) is not None


def gzipped(tag: str) -> dict[str, str]:
    """Headers of a compressed answer, whose ETag is `tag` if it is not."""
    return {"Content-Encoding": "gzip", "ETag": f"W/{tag}"}


async def packed(request: Request, body: bytes, media_type: str, headers: dict[str, str]) -> Response:
    """An answer with an ETag, compressed for those who take that."""
    if takes_gzip(request):
        body = await asyncio.to_thread(gzip.compress, body, 6, mtime=0)
        headers = headers | gzipped(headers["ETag"])
    return Response(body, media_type=media_type, headers=headers)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the errors that it may answer, beside those of every route."""
    return {
        status: {"model": ErrorResponse, "description": _MEANING[status]}
        for status in sorted({*statuses, 401, 403, 500})
    }


def media_types(*offered: str) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: what else than JSON it answers."""
    return {200: {"content": {name: BINARY for name in offered if name != "application/json"}}}


_MEANING = {
    400: "The body is no JSON, or an input is empty.",
    401: "An API key is missing or unknown.",
    403: "The API key may not do this; or none are configured, and the request came from another machine.",
    404: "There is no such thing.",
    406: "None of the media types in Accept can be had.",
    408: "The body came too slowly.",
    409: "The run cannot be served, or a thing is not ready or not switched on; the answer says why.",
    412: "It was changed since it was read; the answer has what it is now.",
    413: "More than the service takes; the answer has the limit and the value.",
    415: "The body is of another media type than application/json.",
    422: "The body or a parameter is not as documented; the answer names the fields.",
    429: "Too much at once; Retry-After says when to ask again.",
    500: "The service failed; its log has the details under the request id.",
    502: "The endpoint of vectors refuses, or its answer is of no use; the answer says why.",
    503: "Not now: the models are being loaded, or are lost; Retry-After says when to ask again.",
    504: "The models did not answer in time.",
}
