"""What the routes about features cost those who encode: `python -m benchmarks.beside --run runs/latest`.

The real service of a run, deployed to a Ray of its own. One client sends a sentence to `POST /encode`, a request at a
time with a pause before each. In turn with that alone another client asks a route beside it, `RATE` times a second,
since all of them share the replica's process and the machine's cores; `GET /healthz`, which does next to nothing, is
there for comparison. Of each: the median over the rounds of latency beside it over latency alone, for the 50th and the
95th percentile, and the route's own median. `with_labels` is `include: ["label"]` in the request itself. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.load import Connection, request
from benchmarks.serve import PAUSE_S, SENTENCE, deployed, machine, percentile, rounded
from mtc.storage import open_run

RATE = 4.0
"""Requests a second of the other client."""
OTHER = "Taxes and the currency were before the House, and the Treasury had much to say of gold and silver."
ROUTES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "healthz": ("GET", "/healthz", None),
    "features": ("GET", "/features?sort=density&limit=50", None),
    "search": ("GET", "/features?query=money+taxes&limit=50", None),
    "feature": ("GET", "/features/7", None),
    "surroundings": ("GET", "/features/7/surroundings", None),
    "by_text": ("POST", "/features/by-text", {"texts": SENTENCE}),
    "feature_page": ("GET", "/ui/feature/7", None),
    "features_page": ("GET", "/ui/features?query=money", None),
    "map_page": ("GET", "/ui/map", None),
}
"""By name: method, path and body."""


class Latencies:
    """Seconds of requests to `/encode`, one after another."""

    def __init__(self, port: int):
        self._connection = Connection("127.0.0.1", port)

    def measure(self, seconds: float, body: dict[str, Any]) -> list[float]:
        sent = request("POST", "/encode", "127.0.0.1", "application/json", json.dumps({"inputs": SENTENCE} | body))
        found, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            status, answer = self._connection.ask(sent)
            found.append(time.perf_counter() - start)
            if status != 200:
                raise SystemExit(f"/encode answered {status}: {answer[:200]!r}")
        return found


class Beside(threading.Thread):
    """Asks one route again and again until it is told to stop."""

    def __init__(self, port: int, route: str):
        super().__init__(daemon=True)
        method, path, body = ROUTES[route]
        self._sent = request(method, path, "127.0.0.1", "*/*", json.dumps(body) if body else "")
        self._connection, self._route = Connection("127.0.0.1", port), route
        self._ended = threading.Event()
        self.seconds: list[float] = []
        self.failure: str | None = None

    def run(self) -> None:
        while not self._ended.wait(1 / RATE):
            start = time.perf_counter()
            status, answer = self._connection.ask(self._sent)
            self.seconds.append(time.perf_counter() - start)
            if status != 200:
                self.failure = f"{self._route} answered {status}: {answer[:200]!r}"
                return

    def end(self) -> list[float]:
        self._ended.set()
        self.join()
        if self.failure:
            raise SystemExit(self.failure)
        return self.seconds


def measure(port: int, routes: Sequence[str], rounds: int, seconds: float) -> dict[str, Any]:
    """The ratios; see the module."""
    encode = Latencies(port)
    ratios: dict[str, dict[str, list[float]]] = {name: {"p50": [], "p95": []} for name in ("with_labels", *routes)}
    own: dict[str, list[float]] = {name: [] for name in routes}
    alone_ms = []
    for name in routes:  # what is made once, such as the index, is made before
        beside = Beside(port, name)
        beside.start()
        encode.measure(2.0, {"include": ["label"]})
        beside.end()
    for turn in range(rounds):
        for name, found in ratios.items():
            alone = encode.measure(seconds, {})
            if name == "with_labels":
                other = encode.measure(seconds, {"include": ["label"]})
            else:
                beside = Beside(port, name)
                beside.start()
                other = encode.measure(seconds, {})
                own[name] += beside.end()
            for which, values in found.items():
                values.append(percentile(other, which) / percentile(alone, which))
            alone_ms.append(1000 * percentile(alone, "p50"))
        print(f"round {turn + 1}: {rounded({name: found['p50'][-1] for name, found in ratios.items()})}", flush=True)
    return {
        "alone_p50_ms": statistics.median(alone_ms),
        "ratios": {name: {k: statistics.median(v) for k, v in found.items()} for name, found in ratios.items()},
        "own_p50_ms": {name: 1000 * percentile(found, "p50") for name, found in own.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a finished, analysed run")
    parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES), help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (default: 6)")
    options = parser.parse_args(argv)
    from serve.contract import ENVIRONMENT, Settings, free_ports

    # Before torch's and Ray's processes start; see benchmarks.serve.
    os.environ.update(RAY_AUTH_MODE="disabled", KMP_BLOCKTIME="0", OMP_WAIT_POLICY="PASSIVE", RAY_worker_niceness="0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(ENVIRONMENT | free_ports())
    with deployed(Settings(run=open_run(options.run).url)) as port:
        found = measure(port, options.routes, options.rounds, options.seconds)
    print(json.dumps({**found, "rate": RATE, "rounds": options.rounds, "machine": machine()}))
    return 0


if __name__ == "__main__":
    # Under its real name: what is defined in __main__ can't be imported by Ray's workers.
    from benchmarks.beside import main as imported_main

    sys.exit(imported_main())
