"""What uvicorn answers by itself, before there is a request that the application could answer."""

from __future__ import annotations

import uuid

import orjson
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.contract import ErrorResponse, ReplicaMetrics
from serve.http.middleware import HEADERS
from serve.http.observe import log_answer


def use_http_protocol(metrics: ReplicaMetrics) -> None:
    """Let uvicorn servers of this process that are started from now on have it, for who cannot choose theirs."""
    HTTP_PROTOCOLS["auto"] = http_protocol(metrics)  # type: ignore[assignment]


def http_protocol(metrics: ReplicaMetrics) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, whose refusals of what is no HTTP have the shape of all errors, are counted and logged; for
    `uvicorn.Config(http=...)`. There are no websockets: a request to change to another protocol is answered in HTTP."""

    class Protocol(HttpToolsProtocol):
        def send_400_response(self, msg: str) -> None:
            state = {"request_id": uuid.uuid4().hex, "error_type": "malformed_http"}
            error = (
                "this is no HTTP request that is taken: its method, address, a header or the body's framing is wrong"
            )
            body = orjson.dumps(ErrorResponse(error=error, **state).model_dump())
            headers = HEADERS | {
                "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
                "X-Request-ID": state["request_id"],
            }  # fmt: skip
            lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers.items())
            self.transport.write(STATUS_LINE[400] + lines.encode("latin-1") + b"\r\n" + body)
            self.transport.close()
            if self.cycle is None or self.cycle.response_complete:  # else the application counts its request
                metrics.http_requests.labels("none", "any", "400").inc()
                log_answer("none", "any", 400, 0.0, state)

        def _should_upgrade_to_ws(self) -> bool:
            return False

    return Protocol
