"""ASGI middleware that every request passes: ids and headers, HEAD, other origins, room for work, and what nobody
expected."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers as RequestHeaders
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtc.request_ids import request_id_for
from serve.contract import ServiceError
from serve.http.errors import send_error, unexpected

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
WORK = re.compile(r"/(encode|tokenize|decode|features/by-text|graph(/[^/]+/result)?|steer|ablate)")
"""Paths of requests that take memory and computation."""


class Head:
    """HEAD is answered as GET, without the body."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        as_get = {**scope, "method": "GET"}  # the server's own stays HEAD: it checks the length of what is sent

        async def without_body(message: Message) -> None:
            if "route" in as_get:
                scope["route"] = as_get["route"]  # for what is counted
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app(as_get, receive, without_body)


class Headers:
    """Gives each request an id, and each answer its headers.

    Ray Serve adds the id's header itself: then `name_requests` is false, or each answer would have two.
    """

    def __init__(self, app: ASGIApp, name_requests: bool = True):
        self.app, self.name_requests = app, name_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope.setdefault("state", {})["request_id"] = request_id_for(scope["headers"])

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if self.name_requests:
                    headers["X-Request-ID"] = request_id
            await send(message)

        await self.app(scope, receive, with_headers)


class Failures:
    """Answers what nobody expected with 500. It lies within `Headers` and `Cors`, so that pages can read that, too."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            answer = unexpected(error, scope["state"]["request_id"])
            if started:
                raise  # the connection breaks, so that nobody takes a part for the whole
            await send_error(scope, receive, send, answer)


class Cors(CORSMiddleware):
    """Starlette's, with errors of our shape: pages of the listed origins may ask, with an API key, never a cookie."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app, allow_origins=origins, allow_methods=("GET", "HEAD", "POST", "PUT", "DELETE"),
            allow_headers=("Authorization", "X-Request-ID"),
            expose_headers=("X-Request-ID", "Retry-After", "ETag", "Location"),
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = RequestHeaders(scope=scope)
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            refused = self.preflight_response(headers) if "origin" in headers else None
            if refused is not None and refused.status_code >= 400:
                error = ServiceError(400, "cors", bytes(refused.body).decode())
                return await send_error(scope, receive, send, error)
        await super().__call__(scope, receive, send)


class Admission:
    """Lets only so many requests for work in at once; the others are refused before their bodies are read."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not WORK.fullmatch(scope["path"]):
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
