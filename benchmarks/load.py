"""A load generator for the service: one process, plain sockets, no HTTP library between it and the clock. It is to need
little of the cores that it shares with the service, hence uvloop.

    python -m benchmarks.load < plan.json > records.json

The plan is `Plan` as JSON. `closed`: so many connections, each asks again as soon as it is answered. `open`: requests
leave at random moments (Poisson) of a rate, whatever is answered; their latency counts from the moment at which they
were to leave, so that a generator or a connection that is late flatters nobody.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any, Literal, NamedTuple


class Plan(NamedTuple):
    """What is to be sent."""

    host: str
    port: int
    accept: str
    bodies: list[str]
    """JSON bodies of `POST /encode`, sent in turn."""
    tokens: list[int]
    """Of each body."""
    mode: Literal["closed", "open"]
    seconds: float
    connections: int = 1
    """In a closed loop."""
    rate: float = 0.0
    """Requests per second in an open loop."""
    seed: int = 0
    probe_s: float = 0.0
    """How often `GET /healthz` is asked beside; 0 never."""


class Record(NamedTuple):
    """One request; seconds since the start of the load."""

    due: float
    """When it was to leave."""
    done: float
    """When its answer had arrived whole."""
    status: int
    """Of HTTP; 0 for a connection that broke."""
    tokens: int
    size: int
    """Bytes of the body."""


class Result(NamedTuple):
    records: list[Record]
    probes: list[Record]
    """Of `GET /healthz`."""


def request(method: str, path: str, host: str, accept: str, body: str = "") -> bytes:
    """A whole HTTP/1.1 request."""
    content = body.encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\nContent-Length: {len(content)}\r\n"
    return (head + "Content-Type: application/json\r\n\r\n").encode() + content


class Connection:
    """One request after another over one blocking socket."""

    def __init__(self, host: str, port: int):
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def ask(self, sent: bytes) -> tuple[int, bytes]:
        """Status and body."""
        self._socket.sendall(sent)
        head = []
        while (line := self._file.readline()) not in (b"\r\n", b""):
            head.append(line)
        status, length = _head(head)
        return status, self._file.read(length)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


async def send(plan: Plan) -> Result:
    """Send the plan and wait for every answer."""
    loop = asyncio.get_running_loop()
    requests = [request("POST", "/encode", plan.host, plan.accept, body) for body in plan.bodies]
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    result, start, number = Result([], []), loop.time(), 0

    async def ask(due: float, sent: bytes, tokens: int, records: list[Record]) -> None:
        status, size, pair = 0, 0, None
        try:
            pair = idle.pop() if idle else await asyncio.open_connection(plan.host, plan.port)
            reader, writer = pair
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).splitlines()
            status, size = _head(head)
            await reader.readexactly(size)
            idle.append(pair)
        except (OSError, asyncio.IncompleteReadError):
            status = 0
            if pair is not None:
                pair[1].close()
        records.append(Record(due, loop.time() - start, status, tokens, size))

    def next_one(due: float) -> Coroutine[Any, Any, None]:
        nonlocal number
        which = number % len(requests)
        number += 1
        return ask(due, requests[which], plan.tokens[which], result.records)

    async def closed() -> None:
        while (due := loop.time() - start) < plan.seconds:
            await next_one(due)

    async def open_loop() -> None:
        chance, due = random.Random(plan.seed), 0.0
        async with asyncio.TaskGroup() as group:
            while (due := due + chance.expovariate(plan.rate)) < plan.seconds:
                await asyncio.sleep(max(0.0, start + due - loop.time()))
                group.create_task(next_one(due))

    async def probe() -> None:
        health, due = request("GET", "/healthz", plan.host, "application/json"), 0.0
        async with asyncio.TaskGroup() as group:
            while plan.probe_s and (due := due + plan.probe_s) < plan.seconds:
                await asyncio.sleep(max(0.0, start + due - loop.time()))
                group.create_task(ask(due, health, 0, result.probes))

    work = [closed() for _ in range(plan.connections)] if plan.mode == "closed" else [open_loop()]
    await asyncio.gather(*work, probe())
    for _, writer in idle:
        writer.close()
    return result


def _head(lines: list[bytes]) -> tuple[int, int]:
    """Status and length of an answer."""
    if not lines:
        raise ConnectionResetError("the connection ended before an answer")
    length = next((int(line[15:]) for line in lines if line[:15].lower() == b"content-length:"), None)
    if length is None:
        raise ValueError("an answer without Content-Length")
    return int(lines[0].split()[1]), length


def run(plan: Plan) -> Result:
    """Send a plan from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load"]
    done = subprocess.run(command, input=json.dumps(plan._asdict()), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return Result(*([Record(*record) for record in found[name]] for name in Result._fields))


if __name__ == "__main__":
    import uvloop  # comes with ray[serve]

    json.dump(uvloop.run(send(Plan(**json.load(sys.stdin))))._asdict(), sys.stdout)
