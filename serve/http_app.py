"""The ASGI application of one replica: routes, limits, keys, errors. Needs no Ray."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import install_error_handlers, request_id
from serve.observe import Observe
from serve.routes import encode, features, operations, pages, report
from serve.service import Service


class RequestIds:
    """ASGI middleware: each request has an id, in its scope and in its answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            scope.setdefault("state", {})["request_id"] = request_id(headers)
        await self.app(scope, receive, send)


def create_app(service: Service) -> FastAPI:
    """The application for a service."""
    app = FastAPI(title="Matryoshka transcoder")
    app.state.service = service
    for each in (encode, features, report, operations, pages):
        app.include_router(each.router)
    install_error_handlers(app)
    app.add_middleware(RequestIds)
    app.add_middleware(Observe, metrics=service.metrics)
    return app
