"""One shape for every error: `ErrorResponse`, whoever noticed it."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from mtc.config import wanted
from serve.contract import ErrorResponse, ServiceError
from serve.http.pages import error_page, wants_page

logger = logging.getLogger("ray.serve")

_LONGEST_NAME = 100
"""Characters of a field's name that are repeated."""
_TYPES = {404: "not_found", 405: "method_not_allowed"}


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


def error_response(scope: Scope, error: ServiceError) -> Response:
    """The error as an answer to a request."""
    scope["state"]["error_type"] = error.error_type  # for what is counted
    if wants_page(scope):
        return error_page(error.status, error.error_type, error.message, scope["state"]["request_id"], error.headers)
    body = orjson.dumps(_body(error, scope["state"]["request_id"]))
    return Response(body, error.status, error.headers, media_type="application/json")


def error_line(error: ServiceError, request_id: str) -> bytes:
    """The error as the last line of an NDJSON answer that had begun."""
    return orjson.dumps({"type": "error"} | _body(error, request_id)) + b"\n"


async def send_error(scope: Scope, receive: Receive, send: Send, error: ServiceError) -> None:
    """Answer with an error from a middleware."""
    await error_response(scope, error)(scope, receive, send)


def invalid(error: ValidationError | RequestValidationError) -> ServiceError:
    """422 with the fields that are wrong and what is wanted there. What was sent is not repeated: it may be private.

    Names of fields are, as far as one can be read.
    """
    faults: dict[tuple[str, ...], dict[str, None]] = {}
    for each in error.errors():
        # Names of alternatives and of constraints are no part of what was sent.
        parts = (str(part)[:_LONGEST_NAME] for part in each["loc"])
        place = tuple(
            part for part in parts if not re.match(r"(list|constrained|function|TargetFeature)\W", f"{part}.")
        )
        faults.setdefault(place, {})[wanted(each)] = None
    # Of alternatives, such as one text or several, the one that was meant is the one that was got into.
    entered = {place[:depth] for place in faults for depth in range(1, len(place))}
    fields = [
        {"field": ".".join(place), "message": ", or ".join(messages)}
        for place, messages in faults.items()
        if place not in entered
    ]
    message = "; ".join(f"{f['field']}: {f['message']}" if f["field"] else f["message"] for f in fields[:10])
    return ServiceError(422, "validation", message, fields[:100])


def repeated(fields: Sequence[str]) -> ServiceError:
    """422 for fields of which each is given more than once."""
    detail = [{"field": field, "message": "is given twice"} for field in fields]
    return ServiceError(422, "validation", "; ".join(f"{field}: is given twice" for field in fields[:10]), detail)


def unexpected(error: BaseException, request_id: str) -> ServiceError:
    """500, with what happened in the log: types and places, not messages, which may hold what was sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-12:]))
    logger.error("request %s failed: %s at %s", request_id, type(error).__name__, where)
    return ServiceError(500, "internal", "the service failed; its log has the details under this request id")


def _body(error: ServiceError, request_id: str) -> dict[str, Any]:
    body = ErrorResponse(error=error.message, error_type=error.error_type, request_id=request_id, detail=error.detail)
    return body.model_dump(mode="json")


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(request.scope, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    kind = _TYPES.get(error.status_code, "http_error")
    headers = dict(error.headers) if error.headers else {}
    if "Allow" in headers:  # the router names those of one of the path's routes
        methods = request.app.state.allowed(request.url.path) or headers["Allow"].split(", ")
        headers["Allow"] = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
    message = f"{error.detail}: {request.method[:20]} {request.url.path[:200]}"
    return error_response(request.scope, ServiceError(error.status_code, kind, message, headers=headers))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request.scope, invalid(error))
