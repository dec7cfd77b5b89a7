"""What the service counts, and how the counts of all replicas become one page for Prometheus.

Each replica counts in a registry of its own. Its totals travel as plain numbers (`snapshot`) to one place, where those
of all replicas, dead ones too, are added (`render`): a scrape that reaches any replica sees the whole service.
No label holds text of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Family(NamedTuple):
    """One metric of one replica."""

    name: str
    kind: str
    """counter, gauge, histogram."""
    documentation: str
    samples: tuple[tuple[str, tuple[tuple[str, str], ...], float], ...]
    """Name, sorted labels and value of each."""


Snapshot = tuple[Family, ...]


class IngressMetrics:
    """What a replica that speaks HTTP counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "mtc_http_requests", "Answers, by route, method and status.", ["route", "method", "code"], registry=registry
        )
        self.requests = Counter(
            "mtc_encode_requests", "Answers to POST /encode, by status.", ["code"], registry=registry
        )
        self.duration = Histogram(
            "mtc_encode_duration_seconds",
            "Time of POST /encode by stage: total, tokenise, models (queue and forward pass), serialise.",
            ["stage"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.tokens = Counter("mtc_encode_tokens", "Tokens of encoded inputs.", registry=registry)
        self.rejected = Counter(
            "mtc_encode_rejected", "Requests to encode that were refused, by the error's type.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("mtc_http_requests_in_flight", "Requests being worked on.", registry=registry)
        self.retries = Counter(
            "mtc_encode_retries", "Encodings that were asked for again because a replica was lost.", registry=registry
        )


class EncoderMetrics:
    """What a replica that holds the models counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.batch_tokens = Histogram(
            "mtc_encode_batch_tokens", "Tokens of a forward pass.", buckets=TOKENS, registry=registry
        )
        self.forward = Histogram(
            "mtc_encode_forward_seconds", "Time of a forward pass.", buckets=SECONDS, registry=registry
        )
        self.queued = Gauge("mtc_encode_queue_tokens", "Tokens that wait for a forward pass.", registry=registry)
        self.loaded = Gauge("mtc_runs_loaded", "Runs in memory, over all replicas.", registry=registry)
        self.loads = Counter("mtc_run_loads", "Runs that were loaded, by outcome.", ["outcome"], registry=registry)


def snapshot(registry: CollectorRegistry) -> Snapshot:
    """A registry's totals as plain numbers."""
    return tuple(
        Family(
            metric.name,
            metric.type,
            metric.documentation,
            tuple(
                (sample.name, tuple(sorted(sample.labels.items())), sample.value)
                for sample in metric.samples
                if not sample.name.endswith("_created")  # when a replica began to count says nothing of the whole
            ),
        )
        for metric in registry.collect()
    )


def render(live: Iterable[Snapshot], gone: Iterable[Snapshot] = (), info: Iterable[Family] = ()) -> bytes:
    """The sum of all snapshots in Prometheus's text format; of replicas that are gone no gauges. `info` as it is."""
    registry = CollectorRegistry()
    registry.register(_Sum(live, gone, info))
    return generate_latest(registry)


class _Sum(Collector):
    def __init__(self, live: Iterable[Snapshot], gone: Iterable[Snapshot], info: Iterable[Family]):
        self._families: dict[str, Family] = {}
        self._totals: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for snapshots, gauges in ((live, True), (gone, False)):
            for family in (family for each in snapshots for family in each if gauges or family.kind != "gauge"):
                self._add(family)
        for family in info:
            self._add(family)

    def _add(self, family: Family) -> None:
        self._families.setdefault(family.name, family)
        totals = self._totals.setdefault(family.name, {})
        for name, labels, value in family.samples:
            totals[name, labels] = totals.get((name, labels), 0.0) + value

    def collect(self) -> Iterator[Metric]:
        for name, family in sorted(self._families.items()):
            metric = Metric(name, family.documentation, family.kind)
            for (sample, labels), value in self._totals[name].items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
