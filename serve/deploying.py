"""Deploying in bounded time: a replica that finds no CPU, GPU or memory is waited for by Serve without end or word."""

from __future__ import annotations

import sys
import time

import ray
from ray import serve as ray_serve

from mtc.errors import MtcError

DEPLOY_S = 600.0
"""Longest wait for an application's replicas, seconds; loading a large model is part of it."""
SAY_S = 15.0
"""Seconds between lines about what is waited for."""


class DeployError(MtcError):
    """The application does not run; the message says why."""

    exit_code = 1
    event = "failed"


def deploy(
    application: ray_serve.Application, name: str, wanted: str, seconds: float = DEPLOY_S, route: str = "/"
) -> None:
    """Deploy to the connected cluster, at the URL path `route`, and wait until all replicas are ready.

    `wanted` says for people what the replicas reserve. Raises DeployError where they fail, and after `seconds`; Serve
    goes on trying then, and has them run as soon as there is room.
    """
    ray_serve.run_many(
        [ray_serve.RunTarget(application, name=name, route_prefix=route)], wait_for_applications_running=False
    )
    began, said = time.monotonic(), 0.0
    while (state := ray_serve.status().applications[name]).status != "RUNNING":
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY", "DELETING"):
            raise DeployError(f"{name} is {state.status}: {state.message.strip()}")
        waited = time.monotonic() - began
        if waited > said + SAY_S or waited > seconds:
            said = waited
            line = f"not all replicas of {name} are ready after {waited:.0f} s: {wanted}, {_free()}"
            if waited > seconds:
                raise DeployError(f"{line}; Serve goes on waiting for room")
            print(f"serve.app: {line}", file=sys.stderr, flush=True)
        time.sleep(0.1)


def _free() -> str:
    """What the cluster has, and what of that is free."""
    has, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(kind, 0):g} of {has[kind]:g} {kind}s" for kind in ("CPU", "GPU") if kind in has]
    return f"the cluster has {', '.join(parts)} free"
