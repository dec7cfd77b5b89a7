"""The ASGI application of one replica: routes behind limits, keys and counters. Needs no Ray."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse

from serve.http.access import Access, allowed, check_routes
from serve.http.errors import install_error_handlers
from serve.http.keys import Keys
from serve.http.middleware import Admission, Cors, Failures, Head, Headers
from serve.http.observe import Observe
from serve.http.openapi import document
from serve.http.routes import circuits, encode, features, operations, pages, report
from serve.http.routes.common import own_method, single_parameters
from serve.service import Service


def create_app(service: Service, name_requests: bool = True) -> FastAPI:
    """The application for a service; `name_requests` is false behind a server that adds X-Request-ID itself.

    Raises ValueError for keys that can't be read, or a route that nobody listed.
    """
    settings = service.settings
    app = FastAPI(
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        dependencies=[Depends(own_method), Depends(single_parameters)],
        generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    app.state.service, app.state.allowed = service, allowed
    app.state.keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
    for each in (encode, circuits, features, report, operations, pages):
        app.include_router(each.router)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        """This API."""
        return JSONResponse(document(app, settings))

    install_error_handlers(app)
    check_routes(app)
    # The last one added is the outermost.
    app.add_middleware(Admission, limit=settings.max_concurrent_requests)
    app.add_middleware(Access, keys=app.state.keys)
    app.add_middleware(Failures)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(Headers, name_requests=name_requests)
    app.add_middleware(Head)
    app.add_middleware(Observe, metrics=service.metrics)
    return app
