"""One shape for every error: `ErrorResponse`, whoever noticed it."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from serve.schemas import ErrorResponse

_TYPES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class ServiceError(Exception):
    """An answer of `status` with the error shape."""

    def __init__(
        self, status: int, error_type: str, message: str, detail: Any = None, headers: dict[str, str] | None = None
    ):
        super().__init__(status, error_type, message, detail, headers)  # all arguments: it must survive pickling
        self.status, self.error_type, self.message = status, error_type, message
        self.detail, self.headers = detail, headers

    def __str__(self) -> str:
        return self.message


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)


def request_id(headers: Any) -> str:
    """The id that the proxy gave the request, or a new one."""
    return headers.get("x-request-id") or uuid.uuid4().hex


def error_body(error: ServiceError, request_id: str) -> bytes:
    """The error as JSON."""
    body = ErrorResponse(error=error.message, error_type=error.error_type, request_id=request_id, detail=error.detail)
    return orjson.dumps(body.model_dump(mode="json"))


def invalid(error: ValidationError | RequestValidationError) -> ServiceError:
    """422 with the fields that are wrong. What was sent is not repeated: it may be private."""
    fields = [{"field": ".".join(str(p) for p in e["loc"]), "message": e["msg"]} for e in error.errors()]
    message = "; ".join(f"{f['field']}: {f['message']}" if f["field"] else f["message"] for f in fields)
    return ServiceError(422, "validation", message, fields)


def _answer(request: Request, error: ServiceError) -> Response:
    request.scope["state"]["error_type"] = error.error_type  # for what is counted
    body = error_body(error, request.scope["state"].get("request_id") or request_id(request.headers))
    return Response(body, error.status, error.headers, media_type="application/json")


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _answer(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    kind = _TYPES.get(error.status_code, "http_error")
    headers = dict(error.headers) if error.headers else None
    message = f"{error.detail}: {request.method} {request.url.path}"
    return _answer(request, ServiceError(error.status_code, kind, message, headers=headers))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _answer(request, invalid(error))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    message = "the service failed; its log has the details under this request id"
    return _answer(request, ServiceError(500, "internal", message))
