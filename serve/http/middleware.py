"""ASGI middleware that every request passes: ids and headers, room for work, and what nobody expected."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract import ServiceError
from serve.http.errors import new_request_id, send_error, unexpected

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Of every answer, unless its route set another value."""
WORK = {"/encode", "/tokenize", "/decode"}


class Headers:
    """Gives each request an id, and each answer its headers; answers what nobody expected with 500."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), None)
        request_id = scope.setdefault("state", {})["request_id"] = new_request_id(given)
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-ID"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:
            answer = unexpected(error, request_id)
            if started:
                raise  # the connection breaks, so that nobody takes a part for the whole
            await send_error(scope, receive, with_headers, answer)


class Admission:
    """Lets only so many requests for work in at once; the others are refused before their bodies are read."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in WORK:
            return await self.app(scope, receive, send)
        if self._inside >= self.limit:
            detail = {"limit": self.limit, "value": self._inside + 1}
            message = f"{self._inside} requests are being worked on, the limit is {self.limit}"
            error = ServiceError(429, "overloaded", message, detail, {"Retry-After": "1"})
            return await send_error(scope, receive, send, error)
        self._inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._inside -= 1
