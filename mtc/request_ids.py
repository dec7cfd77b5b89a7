"""Ids of requests, and the middleware that Ray Serve puts before its own, so that a request has one id everywhere.

Serve sends a client's `X-Request-ID` back as it came, whatever it holds. Ray's processes import this module by name
(`serve.contract.ENVIRONMENT`), also those of other applications of the cluster, in whose working directory may be a
`serve` of their own: so it needs nothing but starlette, and is not in that package.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

_HEADER = b"x-request-id"
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")


def request_id_for(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The client's or the proxy's own id if there is one and it is a plain word, else a new one: it is written into
    logs."""
    given = [value.decode("latin-1") for name, value in headers if name == _HEADER]
    return given[0] if len(given) == 1 and _PLAIN.fullmatch(given[0]) else uuid.uuid4().hex


def serve_middlewares() -> list[Middleware]:
    """What Serve calls for the middlewares of its HTTP servers."""
    return [Middleware(OneRequestId)]


class OneRequestId:
    """ASGI middleware: the request's id becomes a plain word before anybody reads it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            others = [(name, value) for name, value in scope["headers"] if name != _HEADER]
            headers = [*others, (_HEADER, request_id_for(scope["headers"]).encode())]
            scope = {**scope, "headers": headers}
        await self.app(scope, receive, send)
