"""Every metric that any part of the product exports: one catalogue, from which they are all made.

Names follow Prometheus: a unit as suffix, `_total` for counters, labels for what is summed over. Who exports what:

    JOB      the job's driver, about the whole run (`cluster.metrics_port`): one endpoint, exact sums over trainers
    PROCESS  each trainer and model actor, through the metrics agent of its Ray node, which puts `ray_` before the name
             and adds the process as `WorkerId`: for looking into one of them
    SERVICE  the service's `GET /metrics`: sums over all replicas

Dashboards and alerts (k8s/monitoring) are generated and checked against this list.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
RAY_PREFIX = "ray_"


class Instrument(NamedTuple):
    """One metric that Prometheus may see."""

    name: str
    """Name of the metric as Prometheus shows it; counters end in `_total`."""
    kind: Kind
    """Kind of metric: counter, gauge or histogram."""
    documentation: str
    """What the metric counts or shows, in one sentence."""
    labels: tuple[str, ...] = ()
    """Names of the metric's labels."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


def _counter(name: str, documentation: str, *labels: str) -> Instrument:
    return Instrument(name, "counter", documentation, labels)


def _gauge(name: str, documentation: str, *labels: str) -> Instrument:
    return Instrument(name, "gauge", documentation, labels)


RUN = "run_id"
OF_MEMBER = (RUN, "layer", "member")  # `member` is empty without a sweep
JOB = (
    _gauge("mtc_job_info", "1; what the run reads.", RUN, "model", "layers", "device"),
    _gauge("mtc_job_stage", "1 for what the job does now, 0 for what it did.", RUN, "stage"),
    _gauge("mtc_tokenised_tokens", "Tokens of the token store so far, by split.", RUN, "split"),
    _gauge("mtc_tokenise_target_tokens", "Tokens that the run wants of each split; a short text has fewer.", RUN,
           "split"),
    _gauge("mtc_job_trainers", "Trainers that the plan has.", RUN),
    _gauge("mtc_job_model_actors", "Model actors that the plan has.", RUN),
    _gauge("mtc_train_step", "Optimizer steps done; falls when a restart goes back to a checkpoint.", RUN),
    _gauge("mtc_train_target_steps", "Optimizer steps that the run will have.", RUN),
    _counter("mtc_train_tokens_total", "Tokens trained on, repeats and those again after a restart included.", RUN),
    _counter("mtc_train_repeated_steps_total", "Steps that a restart from a checkpoint undid.", RUN),
    Instrument("mtc_train_step_duration_seconds", "histogram", "Time from one optimizer step to the next, on the first "
               "trainer, waiting included.", (RUN,), SECONDS),
    _counter("mtc_train_seconds_total", "The trainers' wall time by part (waiting, transport, step, all_reduce, "
             "checkpoint, other), summed over them.", RUN, "part"),
    _counter("mtc_train_skipped_steps_total", "Steps whose gradient was not finite.", *OF_MEMBER),
    _gauge("mtc_train_loss", "Training loss of the newest logged step.", *OF_MEMBER),
    _gauge("mtc_train_learning_rate", "Learning rate of the newest logged step.", *OF_MEMBER),
    _gauge("mtc_train_gradient_norm", "Gradient norm before clipping, of the newest logged step.", *OF_MEMBER),
    _gauge("mtc_fvu_ratio", "Fraction of variance unexplained on the newest logged batch, by nested prefix.",
           *OF_MEMBER, "prefix"),
    _gauge("mtc_l0_features", "Active features per token on the newest logged batch.", *OF_MEMBER),
    _gauge("mtc_features", "Features of the dictionary, by group.", *OF_MEMBER, "group"),
    _gauge("mtc_dead_features", "Features that have not fired for dead_after_tokens, by group.", *OF_MEMBER, "group"),
    _counter("mtc_stream_tokens_total", "Token positions that ran through the language model.", RUN),
    _counter("mtc_stream_forward_seconds_total", "Time of the language model's forward passes, summed over actors.",
             RUN),
    _counter("mtc_stream_wait_seconds_total", "Time without work by stage: trainer (for activations), all_reduce (for "
             "other trainers), model_actor (for a work unit), object_store (to hand activations over).", RUN, "stage"),
    _counter("mtc_events_total", "Lines of events.jsonl by kind: failures, restarts, loss spikes.", RUN, "kind"),
    _counter("mtc_checkpoints_total", "Checkpoints that were completed.", RUN),
    _gauge("mtc_last_checkpoint_timestamp_seconds", "When the newest checkpoint was completed, in Unix time.", RUN),
    _gauge("mtc_last_progress_timestamp_seconds", "When the job last got on, in Unix time: a stage began, text became "
           "tokens, a trainer sent figures, a part of the analysis arrived.", RUN),
)  # fmt: skip
PROCESS = (
    _counter("mtc_trainer_tokens_total", "Tokens trained on by this trainer's rank.", RUN, "rank"),
    _counter("mtc_trainer_seconds_total", "Wall time of this trainer by part.", RUN, "rank", "part"),
    Instrument("mtc_trainer_step_duration_seconds", "histogram", "Time from one step to the next.", (RUN, "rank"),
               SECONDS),
    _counter("mtc_model_actor_tokens_total", "Token positions through this actor's language model.", RUN),
    _counter("mtc_model_actor_seconds_total", "Wall time of this actor by stage: forward, sending, idle.", RUN,
             "stage"),
)  # fmt: skip
REPLICA = (
    _counter("mtc_http_requests_total", "Answers, by route, method and status.", "route", "method", "code"),
    _gauge("mtc_http_requests_in_flight", "Requests being worked on."),
    _counter("mtc_encode_requests_total", "Answers to POST /encode, by status.", "code"),
    Instrument("mtc_encode_duration_seconds", "histogram", "Time of POST /encode by stage: total, tokenise, models "
               "(queue and forward pass), serialise.", ("stage",), SECONDS),
    _counter("mtc_encode_tokens_total", "Tokens of encoded inputs."),
    _counter("mtc_encode_rejected_total", "Requests to encode that were refused, by the error's type.", "reason"),
    Instrument("mtc_encode_batch_tokens", "histogram", "Tokens of a forward pass.", (), TOKENS),
    Instrument("mtc_encode_forward_seconds", "histogram", "Time of a forward pass.", (), SECONDS),
    _gauge("mtc_encode_queue_tokens", "Tokens that wait for a forward pass."),
    _gauge("mtc_runs_loaded", "Runs in memory, over all replicas."),
    _counter("mtc_run_loads_total", "Runs that were loaded, by outcome.", "outcome"),
)  # fmt: skip
CIRCUITS = (
    _counter("mtc_graph_jobs_total", "Attribution graphs that were asked for, by outcome: done, failed, cancelled, "
             "refused.", "outcome"),
    Instrument("mtc_graph_seconds", "histogram", "Time of an attribution graph from its first turn on the model, with "
               "steering's turns meanwhile.", (),
               (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)),
    _gauge("mtc_graph_jobs_pending", "Attribution graphs that wait or are computed."),
    _gauge("mtc_steerings_in_flight", "Prompts that are steered."),
    _counter("mtc_steered_tokens_total", "Steps of steered prompts: one token of each continuation."),
)  # fmt: skip
CONTROL = (
    _gauge("mtc_model_info", "1; the current run.", RUN, "sha256"),
    _gauge("mtc_served_name_usable", "1 while the run that the service was told to serve can be, 0 while another one "
           "answers in its place.", "served"),
)  # fmt: skip
SERVICE = REPLICA + CIRCUITS + CONTROL
CATALOGUE = {instrument.name: instrument for instrument in (*JOB, *PROCESS, *SERVICE)}


def make(name: str, registry: CollectorRegistry) -> Any:
    """prometheus-client's Counter, Gauge or Histogram of a name in the catalogue, registered."""
    instrument = CATALOGUE[name]
    arguments = (instrument.name, instrument.documentation, instrument.labels)
    if instrument.kind == "histogram":
        return Histogram(*arguments, buckets=instrument.buckets, registry=registry)
    return (Counter if instrument.kind == "counter" else Gauge)(*arguments, registry=registry)
