"""Who may ask what: one table of all routes, and nothing that is not in it."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Literal
from urllib.parse import quote

from fastapi import FastAPI
from starlette.responses import RedirectResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.contract import ServiceError
from serve.http.errors import send_error
from serve.http.keys import Keys
from serve.http.pages import wants_page

Level = Literal["public", "user", "admin"]

ROUTES: dict[tuple[str, str], Level] = {
    ("GET", "/healthz"): "public",
    ("GET", "/readyz"): "public",
    ("GET", "/ui/login"): "public",
    ("POST", "/ui/login"): "public",
    ("GET", "/ui/static/{name:path}"): "public",
    ("POST", "/ui/logout"): "user",
    ("GET", "/"): "user",
    ("GET", "/ui"): "user",
    ("GET", "/ui/features"): "user",
    ("GET", "/ui/feature"): "user",
    ("GET", "/ui/feature/{feature}"): "user",
    ("GET", "/ui/doubtful"): "user",
    ("GET", "/ui/map"): "user",
    ("GET", "/ui/map.json"): "user",
    ("GET", "/ui/graph"): "user",
    ("GET", "/docs"): "user",
    ("GET", "/openapi.json"): "user",
    ("GET", "/metrics"): "user",
    ("GET", "/info"): "user",
    ("GET", "/runs"): "user",
    ("GET", "/features"): "user",
    ("POST", "/features/by-text"): "user",
    ("GET", "/features/{feature}"): "user",
    ("GET", "/features/{feature}/examples"): "user",
    ("GET", "/features/{feature}/surroundings"): "user",
    ("PUT", "/features/{feature}/note"): "user",
    ("GET", "/report"): "user",
    ("GET", "/report/files/{name:path}"): "user",
    ("POST", "/encode"): "user",
    ("POST", "/tokenize"): "user",
    ("POST", "/decode"): "user",
    ("POST", "/graph"): "user",
    ("GET", "/graph/{job}"): "user",
    ("GET", "/graph/{job}/result"): "user",
    ("DELETE", "/graph/{job}"): "user",
    ("POST", "/steer"): "user",
    ("POST", "/ablate"): "user",
    ("POST", "/admin/load"): "admin",
}
"""Method and path template of every route, and the key that it asks for."""

_TEMPLATES = [
    re.compile(re.sub(r"\{\w+:path\}", ".*", re.sub(r"\{\w+\}", "[^/]+", path)), re.DOTALL) for _, path in ROUTES
]
COOKIE = "mtc_key"
_LOOPBACK_NAME = re.compile(r"(localhost\.?|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
_SINGLE = {b"authorization", b"content-encoding", b"content-length", b"content-type", b"host", b"origin"}
"""Headers that say one thing: of two, some would read the first and some the last."""


def check_routes(app: FastAPI) -> None:
    """Raises ValueError unless the application's routes are those of the table."""
    found = {(method, path) for path, methods in _routes(app.routes) for method in methods}
    if found != set(ROUTES):
        unlisted, missing = sorted(found - set(ROUTES)), sorted(set(ROUTES) - found)
        raise ValueError(
            f"serve/http/access.py: routes that are not in the table: {unlisted}; that are not there: {missing}"
        )


def allowed(path: str) -> list[str]:
    """Methods that a path has, HEAD apart; a route of its own words goes before a template that they fit."""
    if own := sorted(method for method, template in ROUTES if template == path):
        return own
    return sorted(
        {method for (method, _), template in zip(ROUTES, _TEMPLATES, strict=True) if template.fullmatch(path)}
    )


def check_binding(host: str, api_keys_file: str | None) -> None:
    """Raises ValueError if others than this machine could connect, and no keys are asked for."""
    if api_keys_file is None and not _is_loopback(host):
        raise ValueError(
            f"host {host} can be reached by others, so API keys are needed: make some with `python -m serve.keys add`, "
            "and name the file with --keys or api_keys_file"
        )


class Access:
    """ASGI middleware: refuses who has no key for a route, before anything else is looked at.

    Without `keys` only connections of this machine to itself are answered, by its name: a page of another origin that
    made its name point here sends that name along.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close"})  # there are none
            return await self.app(scope, receive, send)
        try:
            self._check(scope)
        except ServiceError as error:
            if error.status == 401 and scope["method"] == "GET" and wants_page(scope):
                where = scope["path"] + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
                response = RedirectResponse(f"/ui/login?next={quote(where, safe='/')}", 303)
                return await response(scope, receive, send)
            return await send_error(scope, receive, send, error)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        names = Counter(name.decode() for name, _ in scope["headers"] if name in _SINGLE)
        if twice := sorted(name for name, times in names.items() if times > 1):
            raise ServiceError(400, "duplicate_header", f"{', '.join(twice)}: is given twice")
        level = self._level(scope["method"], scope["path"])
        if self.keys is None:
            if not _is_local(scope):
                message = "no API keys are configured, so only this machine is answered, at its loopback address"
                raise ServiceError(403, "no_keys", message)
            return
        if level == "public":
            return
        key = _bearer(scope) or _cookie(scope)
        entry = self.keys.check(key) if key else None
        if entry is None:
            message = "an API key is needed: Authorization: Bearer KEY" if not key else "the API key is not known"
            raise ServiceError(401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})
        if level == "admin" and not entry.admin:
            raise ServiceError(403, "forbidden", f"the key of {entry.name} may not do this")
        scope["state"]["user"] = entry.name

    def _level(self, method: str, path: str) -> Level:
        for ((listed, _), level), template in zip(ROUTES.items(), _TEMPLATES, strict=True):
            if listed == method and template.fullmatch(path):
                return level
        return "user"  # whoever has no key does not learn what there is


def _routes(routes: Iterable[object]) -> list[tuple[str, set[str]]]:
    """Paths and methods of all routes, those of included routers too."""
    found = []
    for route in routes:
        if isinstance(route, Route):
            found.append((route.path, set(route.methods or ()) - {"HEAD"}))
        elif (inner := getattr(route, "routes", None)) is not None:
            found += _routes(inner)
        elif (router := getattr(route, "original_router", None)) is not None:
            found += _routes(router.routes)
        else:
            raise ValueError(f"serve/http/access.py: a route of another kind: {route!r}")
    return found


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _bearer(scope: Scope) -> str | None:
    kind, _, key = _header(scope, b"authorization").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def _cookie(scope: Scope) -> str | None:
    """The key that a browser logged in with; other sites' pages can't use it to change or read anything."""
    if scope["method"] != "GET" and not same_origin(scope):
        return None
    try:
        morsel = SimpleCookie(_header(scope, b"cookie")).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel else None


def same_origin(scope: Scope) -> bool:
    """Whether a page of this server sent the request, by what browsers say of it."""
    host = _header(scope, b"host")
    return _header(scope, b"origin") in (f"http://{host}", f"https://{host}")


def cross_site(scope: Scope) -> bool:
    """Whether another site's page made the browser ask, such as by an image's address."""
    return _header(scope, b"sec-fetch-site") == "cross-site"


def _is_local(scope: Scope) -> bool:
    ends = [scope.get("server"), scope.get("client")]
    addresses = [end[0] for end in ends if end]
    local = len(addresses) == 2 and all(_is_loopback(address) for address in addresses)
    return local and _LOOPBACK_NAME.fullmatch(_header(scope, b"host")) is not None


def _is_loopback(host: str) -> bool:
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
