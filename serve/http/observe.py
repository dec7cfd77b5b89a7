"""Counting and logging every answer, in one place: the outermost ASGI middleware."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract import ReplicaMetrics

logger = logging.getLogger("ray.serve")

CLIENT_GONE, BROKEN = 499, 500


class Observe:
    """Counts and logs by the route's template, never by path, query or body: those may hold prompts."""

    def __init__(self, app: ASGIApp, metrics: ReplicaMetrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, code, begun, counted = time.perf_counter(), CLIENT_GONE, False, False
        scope.setdefault("state", {})

        def count() -> None:
            nonlocal counted
            if not counted:
                counted = True
                self._count(scope, code, time.perf_counter() - start)

        async def counting(message: Message) -> None:
            nonlocal code, begun
            if message["type"] == "http.response.start":
                code, begun = message["status"], True
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                count()  # before the client can know of its answer, so that a scrape that follows has it
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, counting)
        except Exception:
            if begun and not counted:
                code = BROKEN
            raise
        finally:
            self.metrics.in_flight.dec()
            if begun and not counted and code != BROKEN:
                code = CLIENT_GONE  # whoever reads a stream has left before its end
            count()
            self._log(scope, code, time.perf_counter() - start)

    def _count(self, scope: Scope, code: int, seconds: float) -> None:
        route, method = _names(scope)
        self.metrics.http_requests.labels(route, method, str(code)).inc()
        reason = scope["state"].get("error_type")
        if route == "/encode" or scope["path"] == "/encode":
            self.metrics.requests.labels(str(code)).inc()
            self.metrics.duration.labels("total").observe(seconds)
            if reason:
                self.metrics.rejected.labels(reason).inc()

    def _log(self, scope: Scope, code: int, seconds: float) -> None:
        log_answer(*_names(scope), code, seconds, scope["state"])


def log_answer(route: str, method: str, code: int, seconds: float, state: Mapping[str, Any]) -> None:
    """One line of JSON for an answer; `state` has the ids of the request and its run, the layer, and what was wrong."""
    line = {
        "route": route, "method": method, "code": code, "ms": round(seconds * 1e3, 2),
        **{name: state.get(name) for name in ("run_id", "layer", "error_type", "request_id")},
    }  # fmt: skip
    logger.info(orjson.dumps(line).decode())


def _names(scope: Scope) -> tuple[str, str]:
    """The route's template and the method."""
    route = getattr(scope.get("route"), "path", "none")
    return route, scope["method"] if route != "none" else "any"  # clients may invent methods
