"""What the service counts, and how the counts of all replicas become one page for Prometheus.

Each replica counts in a registry of its own. Its totals travel as plain numbers (`take_snapshot`) to one place, where
those of all replicas, dead ones too, are added (`render_metrics`): a scrape that reaches any replica sees the whole
service. No label holds text of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from mtc.telemetry import make


class Family(NamedTuple):
    """One metric of one replica."""

    name: str
    kind: str
    """counter, gauge, histogram."""
    documentation: str
    samples: tuple[tuple[str, tuple[tuple[str, str], ...], float], ...]
    """Name, sorted labels and value of each."""


Snapshot = tuple[Family, ...]


class ReplicaMetrics:
    """What a replica counts: REPLICA of `mtc.telemetry.metrics`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = make("mtc_http_requests_total", registry)
        self.requests = make("mtc_encode_requests_total", registry)
        self.duration = make("mtc_encode_duration_seconds", registry)
        self.tokens = make("mtc_encode_tokens_total", registry)
        self.rejected = make("mtc_encode_rejected_total", registry)
        self.in_flight = make("mtc_http_requests_in_flight", registry)
        self.batch_tokens = make("mtc_encode_batch_tokens", registry)
        self.forward = make("mtc_encode_forward_seconds", registry)
        self.queued = make("mtc_encode_queue_tokens", registry)
        self.loaded = make("mtc_runs_loaded", registry)
        self.loads = make("mtc_run_loads_total", registry)


class CircuitMetrics:
    """What the process of graphs and interventions counts: CIRCUITS of `mtc.telemetry.metrics`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.jobs = make("mtc_graph_jobs_total", registry)
        self.seconds = make("mtc_graph_seconds", registry)
        self.pending = make("mtc_graph_jobs_pending", registry)
        self.steerings = make("mtc_steerings_in_flight", registry)
        self.steered = make("mtc_steered_tokens_total", registry)


def take_snapshot(registry: CollectorRegistry) -> Snapshot:
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


def render_metrics(live: Iterable[Snapshot], gone: Iterable[Snapshot] = (), info: Iterable[Family] = ()) -> bytes:
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
