"""What Prometheus sees of a job: the whole run at the driver's own port, each process at its Ray node's agent.

The driver's counters only grow while it lives, whatever trainers and actors do: they add up what each rank says that it
did since it last said so. A restart shows in `mtc_train_repeated_steps_total` and in `mtc_train_step`, which falls. A
new driver begins at 0, which Prometheus takes for the restart that it is. A process's own series end with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from ray.util import metrics

from mtc.config import ConfigError, RunConfig
from mtc.telemetry import CATALOGUE, JOB, make, say
from mtc.text import tokens_wanted


class JobMetrics:
    """Counts for Prometheus what a run's trainers say; see `cluster.progress.Follower`."""

    def __init__(self, config: RunConfig, run_id: str):
        self.registry = CollectorRegistry()
        self._metrics = {instrument.name: make(instrument.name, self.registry) for instrument in JOB}
        self.config, self._run_id = config, run_id
        self._members = {member.name: member.config.transcoder for member in config.members()}
        self._skipped: dict[str, int] = {}
        self._stage: str | None = None
        self.url: str | None = None
        """Address where scrapes are answered; None if they are not."""
        for instrument in JOB:  # a rate needs the zero before the first increase
            if instrument.kind == "counter" and instrument.labels == ("run_id",):
                self._of(instrument.name)
        self._of("mtc_train_target_steps").set(config.total_steps)
        for split, tokens in tokens_wanted(config).items():
            self._of("mtc_tokenise_target_tokens", split=split).set(tokens)
        layers = ",".join(str(sites.layer) for sites in config.model.sites)
        self._about = {"model": config.model.name, "layers": layers}

    def plan(self, device: str, trainers: int, model_actors: int) -> None:
        """Show what the plan gives to the run: trainers and model actors."""
        self._of("mtc_job_info", device=device, **self._about).set(1.0)
        self._of("mtc_job_trainers").set(trainers)
        self._of("mtc_job_model_actors").set(model_actors)

    def stage(self, name: str) -> None:
        """Show which stage the job does from now on."""
        self.progress()
        if self._stage:
            self._of("mtc_job_stage", stage=self._stage).set(0.0)
        self._of("mtc_job_stage", stage=name).set(1.0)
        self._stage = name

    def progress(self) -> None:
        """Show that the present stage gets on."""
        self._of("mtc_last_progress_timestamp_seconds").set(time.time())

    def tokenised(self, tokens: Mapping[str, int]) -> None:
        """Show how many tokens of each split the token store has."""
        self.progress()
        for split, count in tokens.items():
            self._of("mtc_tokenised_tokens", split=split).set(count)

    def row(self, row: dict[str, Any]) -> None:
        transcoder = self._members[row["member"]]
        # Without a sweep the layer says which transcoder it is; to Prometheus an empty label is none.
        which = {"layer": str(row["layer"]), "member": row["member"] if self.config.sweep else ""}
        self._of("mtc_train_step").set(row["step"])
        self._of("mtc_train_loss", **which).set(row["loss"])
        self._of("mtc_train_learning_rate", **which).set(row["lr"])
        self._of("mtc_train_gradient_norm", **which).set(row["gradient_norm"])
        self._of("mtc_l0_features", **which).set(row["l0"])
        self._of("mtc_last_progress_timestamp_seconds").set(row["time"])
        for prefix, fvu in zip(transcoder.prefixes, row["fvu"], strict=True):
            self._of("mtc_fvu_ratio", **which, prefix=str(prefix)).set(fvu)
        for group, (size, dead) in enumerate(zip(transcoder.group_sizes, row["dead_groups"], strict=True)):
            self._of("mtc_features", **which, group=str(group)).set(size)
            self._of("mtc_dead_features", **which, group=str(group)).set(dead)
        before = self._skipped.get(row["member"], 0)
        self._of("mtc_train_skipped_steps_total", **which).inc(max(row["skipped"] - before, 0))
        self._skipped[row["member"]] = row["skipped"]

    def account(self, account: dict[str, Any]) -> None:
        seconds, model = account["seconds"], account["model_seconds"]
        self._of("mtc_train_tokens_total").inc(account["tokens"])
        self._of("mtc_stream_tokens_total").inc(account["positions"])
        self._of("mtc_stream_forward_seconds_total").inc(model["forward"])
        for part, value in seconds.items():
            self._of("mtc_train_seconds_total", part=part).inc(max(value, 0.0))
        waits = {"trainer": seconds["waiting"], "all_reduce": seconds["all_reduce"]}
        waits |= {"model_actor": model["idle"], "object_store": model["sending"]}
        for stage, value in waits.items():
            self._of("mtc_stream_wait_seconds_total", stage=stage).inc(max(value, 0.0))
        if account["rank"] == 0:
            for value in account["step_seconds"]:
                self._of("mtc_train_step_duration_seconds").observe(value)

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint":
            self._of("mtc_checkpoints_total").inc()
            at = datetime.fromisoformat(event["time"]).timestamp()
            self._of("mtc_last_checkpoint_timestamp_seconds").set(at)
        else:
            self._of("mtc_events_total", kind=event["kind"]).inc()
        self._of("mtc_train_repeated_steps_total").inc(event.get("undone", 0))

    @contextmanager
    def served(self) -> Iterator[None]:
        """A context in which scrapes are answered, if `cluster.metrics_port` asks for it. Raises ConfigError if the
        port is taken."""
        cluster = self.config.cluster
        if cluster.metrics_port is None:
            yield
            return
        try:
            server, thread = start_http_server(cluster.metrics_port, cluster.metrics_host, self.registry)
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

    def _of(self, name: str, **labels: str) -> Any:
        return self._metrics[name].labels(run_id=self._run_id, **labels)


def ray_metric(name: str, **fixed: str) -> Any:
    """`ray.util.metrics`' Counter, Gauge or Histogram of a name in the catalogue, for the agent of this Ray node.

    `fixed` are labels that need not be given again. A counter refuses to add 0.
    """
    instrument = CATALOGUE[name]
    metric: Any = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}[instrument.kind]
    more = {"boundaries": list(instrument.buckets)} if instrument.buckets else {}
    return metric(name, instrument.documentation, tag_keys=instrument.labels, **more).set_default_tags(fixed)
