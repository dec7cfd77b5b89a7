"""The ASGI application of one replica: routes behind limits, keys and counters. Needs no Ray."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from serve.http.access import Access, check_routes
from serve.http.errors import install_error_handlers
from serve.http.keys import Keys
from serve.http.middleware import Admission, Headers
from serve.http.observe import Observe
from serve.http.openapi import document
from serve.http.routes import encode, features, operations, pages, report
from serve.http.routes.common import TheService
from serve.service import Service


def create_app(service: Service) -> FastAPI:
    """The application for a service. Raises ValueError for keys that can't be read, or a route that nobody listed."""
    settings = service.settings
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
    for each in (encode, features, report, operations, pages):
        app.include_router(each.router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(service: TheService) -> JSONResponse:
        """This API, with the limits of the current run."""
        run = await service.open(service.state.current)
        return JSONResponse(await asyncio.to_thread(_document, app, service, run))

    install_error_handlers(app)
    check_routes(app)
    # The last one added is the outermost.
    app.add_middleware(Admission, limit=settings.max_concurrent_requests)
    app.add_middleware(Access, keys=app.state.keys)
    app.add_middleware(Headers)
    app.add_middleware(Observe, metrics=service.metrics)
    return app


def _document(app: FastAPI, service: Service, run: Any) -> dict[str, Any]:
    return document(app, service.settings, run)
