"""What tests of the deployed service share: load on it, its processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
TEXTS = ["a", "Hello, world", "<bos> is spelled out", "naïve – ünïcode", "x" * 200, "two\nlines"]


async def load(
    url: str, requests: int, workers: int, answered: Callable[[int, httpx.Response], Any],
    broken: Callable[[str], Any] | None = None, lengths: Sequence[int] = (0,), until: asyncio.Event | None = None,
) -> None:  # fmt: skip
    """`requests` of one text each, some at a time, none after `until`; `answered` gets each one's number and response,
    whose request has the time (monotonic) under `extensions["sent"]`, `broken` what was wrong with a connection that
    ended without one. Bodies are filled up with spaces to so many bytes, in turn."""
    numbers = iter(range(requests))

    async with httpx.AsyncClient(base_url=url, timeout=60, headers={"Content-Type": "application/json"}) as client:

        async def work() -> None:
            for number in numbers:
                if until and until.is_set():
                    return
                body = json.dumps({"inputs": TEXTS[number % len(TEXTS)], "top_k": 64}).ljust(
                    lengths[(number + number // len(TEXTS)) % len(lengths)]
                )
                try:
                    response = await client.post("/encode", content=body, extensions={"sent": time.monotonic()})
                except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                    if broken is None:
                        raise
                    broken(str(error))
                else:
                    answered(number, response)

        await asyncio.gather(*(work() for _ in range(workers)))


def replicas(deployment: str) -> list[int]:
    """Process ids of a deployment's live replicas."""
    import ray

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"]["mtc"]["deployments"][deployment]["replicas"]
    return [replica["pid"] for replica in found if replica["state"] == "RUNNING"]


def wait_until(reached: Callable[[], T]) -> T:
    """What `reached` returns once that is true."""
    deadline = time.monotonic() + 240
    while not (found := reached()):
        assert time.monotonic() < deadline
        time.sleep(0.2)  # asking without a pause takes the cores that a replica needs to start
    return found
