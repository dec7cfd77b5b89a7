"""What Prometheus sees of a job: the whole run at the driver's own port, each process at its Ray node's agent.

The driver's counters only grow while it lives, whatever trainers and actors do: they add up what each rank says that it
did since it last said so. A restart shows in `mtc_train_repeated_steps_total` and in `mtc_train_step`, which falls. A
new driver begins at 0, which Prometheus takes for the restart that it is. A process's own series end with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from ray.util import metrics

from mtc.config import ConfigError, RunConfig
from mtc.telemetry import CATALOGUE, JOB, Instrument, RegistryMeter, say


class RayMeter:
    """Writes some instruments to the metrics agent of this process's Ray node; see `mtc.telemetry.metrics.Meter`."""

    def __init__(self, instruments: tuple[Instrument, ...], **fixed: str):
        self._metrics = {instrument.name: _ray_metric(instrument) for instrument in instruments}
        self._fixed = fixed

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        if amount:  # Ray refuses to add nothing
            self._metrics[name].inc(amount, tags=self._fixed | labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, tags=self._fixed | labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].observe(value, tags=self._fixed | labels)


class JobMetrics:
    """Follows a run and counts; see `cluster.progress.Follower`."""

    def __init__(self, config: RunConfig, run_id: str):
        self.meter = RegistryMeter(JOB, CollectorRegistry(), run_id=run_id)
        self.config = config
        self._skipped: dict[int, int] = {}
        self._stage: str | None = None
        self.url: str | None = None
        """Where scrapes are answered."""
        for instrument in JOB:  # a rate needs the zero before the first increase
            if instrument.kind == "counter" and instrument.labels == ("run_id",):
                self.meter.add(instrument.name, 0.0)
        self.meter.set("mtc_train_target_steps", config.total_steps)
        layers = ",".join(str(sites.layer) for sites in config.model.sites)
        self._about = {"model": config.model.name, "layers": layers}

    def plan(self, device: str, trainers: int, model_actors: int) -> None:
        """What the cluster gives to the run."""
        self.meter.set("mtc_job_info", 1.0, device=device, **self._about)
        self.meter.set("mtc_job_trainers", trainers)
        self.meter.set("mtc_job_model_actors", model_actors)

    def stage(self, name: str) -> None:
        """What the job does from now on."""
        if self._stage:
            self.meter.set("mtc_job_stage", 0.0, stage=self._stage)
        self.meter.set("mtc_job_stage", 1.0, stage=name)
        self._stage = name

    def row(self, row: dict[str, Any]) -> None:
        layer = str(row["layer"])
        self.meter.set("mtc_train_step", row["step"])
        self.meter.set("mtc_train_loss", row["loss"], layer=layer)
        self.meter.set("mtc_train_learning_rate", row["lr"], layer=layer)
        self.meter.set("mtc_train_gradient_norm", row["gradient_norm"], layer=layer)
        self.meter.set("mtc_l0_features", row["l0"], layer=layer)
        self.meter.set("mtc_last_progress_timestamp_seconds", row["time"])
        for prefix, fvu in zip(self.config.transcoder.prefixes, row["fvu"], strict=True):
            self.meter.set("mtc_fvu_ratio", fvu, layer=layer, prefix=str(prefix))
        for group, (size, dead) in enumerate(zip(self.config.transcoder.group_sizes, row["dead_groups"], strict=True)):
            self.meter.set("mtc_features", size, layer=layer, group=str(group))
            self.meter.set("mtc_dead_features", dead, layer=layer, group=str(group))
        before = self._skipped.get(row["layer"], 0)
        self.meter.add("mtc_train_skipped_steps_total", max(row["skipped"] - before, 0), layer=layer)
        self._skipped[row["layer"]] = row["skipped"]

    def account(self, account: dict[str, Any]) -> None:
        seconds, model = account["seconds"], account["model_seconds"]
        self.meter.add("mtc_train_tokens_total", account["tokens"])
        self.meter.add("mtc_stream_tokens_total", account["positions"])
        self.meter.add("mtc_stream_forward_seconds_total", model["forward"])
        for part, value in seconds.items():
            self.meter.add("mtc_train_seconds_total", max(value, 0.0), part=part)
        waits = {"trainer": seconds["waiting"], "all_reduce": seconds["all_reduce"]}
        waits |= {"model_actor": model["idle"], "object_store": model["sending"]}
        for stage, value in waits.items():
            self.meter.add("mtc_stream_wait_seconds_total", max(value, 0.0), stage=stage)
        if account["rank"] == 0:
            for value in account["step_seconds"]:
                self.meter.observe("mtc_train_step_duration_seconds", value)

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":
            self.meter.add("mtc_checkpoints_total")
            at = datetime.fromisoformat(event["time"]).timestamp()
            self.meter.set("mtc_last_checkpoint_timestamp_seconds", at)
        else:
            self.meter.add("mtc_events_total", kind=event["kind"])
        self.meter.add("mtc_train_repeated_steps_total", event.get("undone", 0))

    @contextmanager
    def served(self) -> Iterator[None]:
        """Answer scrapes meanwhile, if `cluster.metrics_port` asks for it. Raises ConfigError if the port is taken."""
        cluster = self.config.cluster
        if cluster.metrics_port is None:
            yield
            return
        try:
            server, thread = start_http_server(cluster.metrics_port, cluster.metrics_host, self.meter.registry)
        except OSError as error:
            raise ConfigError(
                f"cluster.metrics_port={cluster.metrics_port}: cannot listen on {cluster.metrics_host}: "
                f"{error.strerror}; 0 takes a free port"
            ) from None
        self.url = f"http://{cluster.metrics_host}:{server.server_port}/metrics"
        say("metrics", f"metrics at {self.url}", url=self.url)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _ray_metric(instrument: Instrument) -> Any:
    arguments = (instrument.name, CATALOGUE[instrument.name].documentation)
    if instrument.kind == "histogram":
        return metrics.Histogram(*arguments, boundaries=list(instrument.buckets), tag_keys=instrument.labels)
    return (metrics.Counter if instrument.kind == "counter" else metrics.Gauge)(*arguments, tag_keys=instrument.labels)
