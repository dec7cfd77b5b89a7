"""One shape for every error: `ErrorResponse`, whoever noticed it."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schemas import ErrorResponse

_TYPES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class ServiceError(Exception):
    """An answer of `status` with the error shape."""

    def __init__(
        self, status: int, error_type: str, message: str, detail: Any = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message
        self.detail, self.headers = detail, headers


class BodyLimit:
    """ASGI middleware that refuses to read more than `limit` bytes of a body, announced or not."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                # FastAPI turns any other exception that reading a body raises into a 400.
                raise HTTPException(413, f"the body has more than {self.limit} bytes")
            return message

        await self.app(scope, limited, send)


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)


def _answer(
    request: Request,
    status: int,
    error_type: str,
    message: str,
    detail: Any = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    # Serve's proxy gives every request an id and returns it in this header.
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    body = ErrorResponse(error=message, error_type=error_type, request_id=request_id, detail=detail)
    return JSONResponse(body.model_dump(mode="json"), status, headers)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return _answer(request, error.status, error.error_type, error.message, error.detail, error.headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    kind = _TYPES.get(error.status_code, "http_error")
    headers = dict(error.headers) if error.headers else None
    return _answer(request, error.status_code, kind, message, headers=headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fields = [{"field": ".".join(str(p) for p in e["loc"]), "message": e["msg"]} for e in error.errors()]
    message = "; ".join(f"{f['field']}: {f['message']}" for f in fields)
    return _answer(request, 422, "validation", message, fields)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return _answer(request, 500, "internal", "the service failed; its log has the details under this request id")
