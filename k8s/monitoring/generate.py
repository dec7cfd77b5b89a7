"""Makes Grafana's dashboards and Prometheus's rules from code: `python k8s/monitoring/generate.py` writes them here.

Every metric comes from `mtc.telemetry.metrics`, or from the list OTHERS below; a test checks that, and that the files
are those that this would write. The service's totals are the same at every pod that is scraped, so they are never
summed over pods: RECORDED has one figure for each, which dashboards and alerts read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mtc.telemetry.metrics import CATALOGUE, SERVICE

HERE = Path(__file__).resolve().parent
RUNBOOKS = "https://mtc.example.org/runbooks/"
"""Where docs/runbooks.md is to be read: yours (`make docs` builds the site)."""
OTHERS = {
    # Of Prometheus.
    "up": ("job",),
    # Of Ray's agents, about their nodes. On nodes with GPUs:
    "ray_node_gpus_utilization": ("GpuIndex",),
    "ray_node_gram_used": ("GpuIndex",),
    "ray_node_gram_available": ("GpuIndex",),
    "ray_node_cpu_utilization": (),
    "ray_node_mem_used": (),
    "ray_node_mem_total": (),
    "ray_object_store_memory": (),
    # Of the head's agent, about the cluster, from what the autoscaler reports:
    "ray_cluster_active_nodes": ("node_type",),
    "ray_cluster_pending_nodes": ("node_type",),
    "ray_cluster_failed_nodes": ("node_type",),
    # Of KubeRay's operator 1.7 (controllers/ray/metrics), each 1 for what is so.
    "kuberay_job_deployment_status": ("name", "deployment_status"),
    "kuberay_service_condition_ready": ("name", "condition"),
    # Of NVIDIA's dcgm-exporter (etc/default-counters.csv).
    "DCGM_FI_DEV_GPU_UTIL": ("Hostname", "gpu"),
    "DCGM_FI_DEV_FB_USED": ("Hostname", "gpu"),
    "DCGM_FI_DEV_FB_FREE": ("Hostname", "gpu"),
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": ("Hostname", "gpu"),
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": ("Hostname", "gpu"),
}
"""Metrics that are not ours, and the labels of each that are used here."""
RUN = '{run_id=~"$run_id"}'
WINDOW = "$__rate_interval"
SCRAPED_EACH = ("instance", "pod", "container", "endpoint", "namespace")
"""Labels that tell scrapes of one service apart."""


class Recording(NamedTuple):
    """A series that Prometheus computes and keeps."""

    name: str
    expression: str


class Query(NamedTuple):
    """One expression and how its series are called."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """One diagram."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    description: str = ""
    stacked: bool = False


class Dashboard(NamedTuple):
    """One page of diagrams."""

    name: str
    title: str
    by_run: bool
    panels: tuple[Panel, ...]


class Alert(NamedTuple):
    """One rule that wakes somebody up, or only tells."""

    name: str
    expression: str
    minutes: int
    severity: str
    summary: str


def rate(metric: str, by: str, selector: str = RUN) -> str:
    return f"sum by ({by}) (rate({metric}{selector}[{WINDOW}]))"


def whole(expression: str) -> str:
    """Of a service whose replicas all give the same totals."""
    return f"max without ({', '.join(SCRAPED_EACH)}) ({expression})"


def recorded(metric: str, selector: str = "") -> str:
    """The series of RECORDED for a metric of the service: a counter's rate over five minutes, a histogram's buckets',
    or a gauge."""
    name = {"counter": "{}:rate5m", "gauge": "{}:sum", "histogram": "{}_bucket:rate5m"}[CATALOGUE[metric].kind]
    return f"service:{name.format(metric.removesuffix('_total'))}{selector}"


def recording(metric: str) -> Recording:
    """One cluster's pods all give its totals, so the largest of them is taken; two clusters, such as an old one and the
    one that takes its place, answer different requests, so theirs are added up."""
    kind = CATALOGUE[metric].kind
    series = f"{metric}_bucket" if kind == "histogram" else metric
    expression = series if kind == "gauge" else f"rate({series}[5m])"
    each = ", ".join(label for label in SCRAPED_EACH if label != "namespace")
    return Recording(recorded(metric), f"sum without (ray_cluster, namespace) (max without ({each}) ({expression}))")


def quantiles(metric: str, by: str, service: bool = False, selector: str = RUN) -> tuple[Query, ...]:
    labels = ", ".join(name for name in ("le", by) if name)
    increase = recorded(metric) if service else f"rate({metric}_bucket{selector}[{WINDOW}])"
    buckets = f"sum by ({labels}) ({increase})"
    legend = f"{{{{{by}}}}} " if by else ""
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"{legend}p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


def share(metric: str, by: str) -> str:
    """Of a trainer's time."""
    return f"{rate(metric, f'run_id, {by}')} / on (run_id) group_left () {rate('mtc_train_seconds_total', 'run_id')}"


TRAINING = Dashboard("training", "Transcoder training", True, (
    Panel("Progress", (Query(f"mtc_train_step{RUN} / on (run_id) mtc_train_target_steps{RUN}", "{{run_id}}"),),
          "percentunit", "Optimizer steps done of those that the run will have; falls when a restart goes back."),
    Panel("Stage", (Query(f"mtc_job_stage{RUN} == 1", "{{run_id}} {{stage}}"),), description="What the job does."),
    Panel("Tokenised", (Query(f"mtc_tokenised_tokens{RUN} / mtc_tokenise_target_tokens{RUN}",
                              "{{run_id}} {{split}}"),), "percentunit",
          "Tokens in the token store of those that the run wants; a short text ends below 1."),
    Panel("Training time left", (
        Query(f"(mtc_train_target_steps{RUN} - mtc_train_step{RUN}) / (deriv(mtc_train_step{RUN}[15m]) > 0)",
              "{{run_id}}"),
    ), "s", "At the speed of the last quarter of an hour; the analysis comes after it."),
    Panel("Since the job last got on", (Query(f"time() - mtc_last_progress_timestamp_seconds{RUN}", "{{run_id}}"),),
          "s", "In any stage."),
    Panel("Tokens per second", (Query(rate("mtc_train_tokens_total", "run_id"), "{{run_id}}"),), "short",
          "Trained on, over all trainers; tokens that are done again after a restart count again."),
    Panel("FVU by prefix", (Query(f"mtc_fvu_ratio{RUN}", "layer {{layer}} {{member}}, {{prefix}}"),), "none",
          "Fraction of variance unexplained of the newest logged batch, one line for each nested dictionary."),
    Panel("Loss", (Query(f"mtc_train_loss{RUN}", "layer {{layer}} {{member}}"),), "none"),
    Panel("Active features per token", (Query(f"mtc_l0_features{RUN}", "layer {{layer}} {{member}}"),), "none"),
    Panel("Dead features", (Query(f"mtc_dead_features{RUN}", "layer {{layer}} {{member}}, group {{group}}"),), "none",
          "Features that have not fired for transcoder.dead_after_tokens.", True),
    Panel("Time from step to step", quantiles("mtc_train_step_duration_seconds", ""), "s",
          "On the first trainer, waiting included."),
    Panel("Where the trainers' time goes", (Query(share("mtc_train_seconds_total", "part"), "{{part}}"),),
          "percentunit", "Share of the wall time of all trainers.", True),
    Panel("Learning rate", (Query(f"mtc_train_learning_rate{RUN}", "layer {{layer}} {{member}}"),), "none"),
    Panel("Gradient norm", (Query(f"mtc_train_gradient_norm{RUN}", "layer {{layer}} {{member}}"),), "none",
          "Before clipping."),
    Panel("Age of the newest checkpoint",
          (Query(f"time() - mtc_last_checkpoint_timestamp_seconds{RUN}", "{{run_id}}"),), "s",
          "What a failure now would undo."),
    Panel("Checkpoints", (Query(f"increase(mtc_checkpoints_total{RUN}[{WINDOW}])", "{{run_id}}"),), "none",
          "Completed within the window."),
    Panel("What went wrong", (
        Query(f"sum by (kind) (increase(mtc_events_total{RUN}[{WINDOW}]))", "{{kind}}"),
        Query(f"sum by (run_id) (increase(mtc_train_repeated_steps_total{RUN}[{WINDOW}]))", "steps done again"),
        Query(f"sum by (run_id) (increase(mtc_train_skipped_steps_total{RUN}[{WINDOW}]))", "steps skipped"),
    )),
))  # fmt: skip
STREAM = Dashboard("stream", "Activation stream", True, (
    Panel("Tokens per second", (
        Query(rate("mtc_stream_tokens_total", "run_id"), "through the language model"),
        Query(rate("mtc_train_tokens_total", "run_id"), "trained on"),
    )),
    Panel("Who waits", (Query(rate("mtc_stream_wait_seconds_total", "stage"), "{{stage}}"),), "short",
          "Seconds a second. trainer: for activations; all_reduce: trainers for each other; model_actor: for work; "
          "object_store: actors, to hand activations over."),
    Panel("Forward passes", (Query(rate("mtc_stream_forward_seconds_total", "run_id"), "{{run_id}}"),), "short",
          "Model actors that compute, on average."),
    Panel("Processes of the plan", (
        Query(f"mtc_job_trainers{RUN}", "trainers"), Query(f"mtc_job_model_actors{RUN}", "model actors"),
    ), "none"),
    Panel("Tokens per second of each model actor",
          (Query(rate("ray_mtc_model_actor_tokens_total", "NodeAddress, WorkerId"), "{{NodeAddress}} {{WorkerId}}"),)),
    Panel("Model actors' time",
          (Query(rate("ray_mtc_model_actor_seconds_total", "stage"), "{{stage}}"),), "short",
          "Seconds a second, over all actors.", True),
    Panel("Tokens per second of each trainer",
          (Query(rate("ray_mtc_trainer_tokens_total", "rank"), "rank {{rank}}"),)),
    Panel("Time of each trainer's step", quantiles("ray_mtc_trainer_step_duration_seconds", "rank"), "s"),
    Panel("Waiting of each trainer",
          (Query(rate("ray_mtc_trainer_seconds_total", "rank", '{run_id=~"$run_id", part="waiting"}'),
                 "rank {{rank}}"),), "percentunit"),
    Panel("CPUs of the nodes", (Query("avg by (instance) (ray_node_cpu_utilization)", "{{instance}}"),), "percent"),
    Panel("Memory of the nodes",
          (Query("max by (instance) (ray_node_mem_used / ray_node_mem_total)", "{{instance}}"),), "percentunit"),
    Panel("Object store", (Query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),), "bytes"),
))  # fmt: skip
SERVING = Dashboard("serving", "Transcoder service", False, (
    Panel("Requests to encode per second",
          (Query(f"sum by (code) ({recorded('mtc_encode_requests_total')})", "{{code}}"),), "reqps"),
    Panel("Time to encode", quantiles("mtc_encode_duration_seconds", "stage", service=True), "s",
          "By stage; models is the queue and the forward pass."),
    Panel("Tokens per second", (Query(recorded("mtc_encode_tokens_total"), "tokens"),)),
    Panel("All requests per second",
          (Query(f"sum by (route, code) ({recorded('mtc_http_requests_total')})", "{{route}} {{code}}"),), "reqps"),
    Panel("Refused per second",
          (Query(f"sum by (reason) ({recorded('mtc_encode_rejected_total')})", "{{reason}}"),), "reqps"),
    Panel("Work in hand", (
        Query(recorded("mtc_http_requests_in_flight"), "requests"),
        Query(recorded("mtc_encode_queue_tokens"), "tokens that wait"),
    )),
    Panel("Time of a forward pass", quantiles("mtc_encode_forward_seconds", "", service=True), "s"),
    Panel("Tokens of a forward pass", quantiles("mtc_encode_batch_tokens", "", service=True), "none",
          "How well requests are put together."),
    Panel("Runs", (
        Query(recorded("mtc_runs_loaded"), "in memory, over all replicas"),
        Query(f"300 * sum by (outcome) ({recorded('mtc_run_loads_total')})", "{{outcome}} in five minutes"),
    ), "none"),
    Panel("Graphs", (
        Query(recorded("mtc_graph_jobs_pending"), "wait or are computed"),
        Query(f"300 * sum by (outcome) ({recorded('mtc_graph_jobs_total')})", "{{outcome}} in five minutes"),
    ), "none"),
    Panel("Time of a graph", quantiles("mtc_graph_seconds", "", service=True), "s", "Without the wait for its turn."),
    Panel("Steering", (
        Query(recorded("mtc_steerings_in_flight"), "prompts"),
        Query(recorded("mtc_steered_tokens_total"), "steps a second"),
    ), "none"),
    Panel("Current run", (
        Query(recorded("mtc_model_info"), "{{run_id}}"),
        Query(whole("mtc_served_name_usable"), "{{served}} can be served"),
    ), "none", "Where what is to be served can't be, another run answers in its place."),
))  # fmt: skip
GRAM = "(ray_node_gram_used + ray_node_gram_available)"
CLUSTER = Dashboard("cluster", "Jobs, nodes and GPUs", False, (
    Panel("Jobs", (Query('kuberay_job_deployment_status{name=~"mtc.*"}', "{{name}} {{deployment_status}}"),), "none",
          "What KubeRay says of each RayJob; Suspended is waiting in Kueue."),
    Panel("Services that are ready",
          (Query('kuberay_service_condition_ready{name=~"mtc.*", condition="true"}', "{{name}}"),), "none"),
    Panel("Nodes", (
        Query("sum by (node_type) (ray_cluster_active_nodes)", "{{node_type}}"),
        Query("sum by (node_type) (ray_cluster_pending_nodes)", "{{node_type}}, asked for"),
        Query("sum by (node_type) (ray_cluster_failed_nodes)", "{{node_type}}, failed"),
    ), "none", "Of all Ray clusters, as their autoscalers report; node_type is the worker group."),
    Panel("GPUs, by Ray", (Query("avg by (instance, GpuIndex) (ray_node_gpus_utilization)",
                                 "{{instance}} {{GpuIndex}}"),), "percent"),
    Panel("Memory of the GPUs, by Ray", (Query(f"max by (instance, GpuIndex) (ray_node_gram_used / {GRAM})",
                                               "{{instance}} {{GpuIndex}}"),), "percentunit"),
    Panel("GPUs, by DCGM", (Query("avg by (Hostname, gpu) (DCGM_FI_DEV_GPU_UTIL)", "{{Hostname}} {{gpu}}"),),
          "percent", "Share of the time in which any kernel ran."),
    Panel("Tensor cores, by DCGM", (Query("avg by (Hostname, gpu) (DCGM_FI_PROF_PIPE_TENSOR_ACTIVE)",
                                          "{{Hostname}} {{gpu}}"),), "percentunit"),
    Panel("Memory of the GPUs, by DCGM", (
        Query("max by (Hostname, gpu) (DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE))",
              "{{Hostname}} {{gpu}}"),
    ), "percentunit"),
    Panel("NVLink, by DCGM", (Query("max by (Hostname, gpu) (DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL)",
                                    "{{Hostname}} {{gpu}}"),), "none",
          "As DCGM counts it, all lanes: what NCCL and copies between GPUs of a node send."),
    Panel("Trainers in NCCL's all-reduce", (
        Query('sum by (run_id) (rate(mtc_train_seconds_total{part="all_reduce"}[5m])) / '
              "sum by (run_id) (rate(mtc_train_seconds_total[5m]))", "{{run_id}}"),
    ), "percentunit", "Share of their time; on CPUs it is Gloo's."),
))  # fmt: skip
DASHBOARDS = (TRAINING, STREAM, SERVING, CLUSTER)
RECORDED = tuple(recording(instrument.name) for instrument in SERVICE)

TRAINS = '(mtc_job_stage{stage="train"} == 1)'
BEFORE_OR_AFTER = '(mtc_job_stage{stage=~"prepare|tokenise|analyse"} == 1)'
ANSWERS = recorded("mtc_encode_requests_total")
FAILURES = recorded("mtc_encode_requests_total", '{code=~"5.."}')
REFUSALS = recorded("mtc_encode_requests_total", '{code="429"}')
TOTAL_BUCKETS = recorded("mtc_encode_duration_seconds", '{stage="total"}')
UNUSABLE = whole("mtc_served_name_usable")
ALERTS = {
    "mtc-training": (
        Alert("MtcTrainingStalled", f"(time() - mtc_last_progress_timestamp_seconds > 900) and on (run_id) {TRAINS}", 5,
              "critical", "Run {{ $labels.run_id }} has made no step for a quarter of an hour."),
        Alert("MtcStageStalled",
              f"(time() - mtc_last_progress_timestamp_seconds > 3600) and on (run_id) {BEFORE_OR_AFTER}", 5, "warning",
              "Run {{ $labels.run_id }} has not got on for an hour: preparing, tokenising or analysis."),
        Alert("MtcCheckpointsOld", f"(time() - mtc_last_checkpoint_timestamp_seconds > 1800) and on (run_id) {TRAINS}",
              5, "warning", "Run {{ $labels.run_id }} has had no complete checkpoint for half an hour."),
        Alert("MtcCheckpointsMissing", f'{TRAINS} and on (run_id) (mtc_job_stage{{stage="train"}} offset 30m == 1) '
              "unless on (run_id) mtc_last_checkpoint_timestamp_seconds", 0, "warning",
              "Run {{ $labels.run_id }} has trained for half an hour without any complete checkpoint."),
        Alert("MtcTrainersRestart", 'sum by (run_id) (increase(mtc_events_total{kind=~"failure|restart"}[1h])) > 3', 0,
              "warning", "Trainers of run {{ $labels.run_id }} died more than three times within an hour."),
        Alert("MtcStepsSkipped", "sum by (run_id) (increase(mtc_train_skipped_steps_total[15m])) > 10", 0, "warning",
              "More than ten steps of run {{ $labels.run_id }} had no finite gradient within a quarter of an hour."),
        Alert("MtcFeaturesDead", "sum by (run_id, layer, member) (mtc_dead_features) / "
              "sum by (run_id, layer, member) (mtc_features) > 0.2", 15, "warning",
              "A fifth of the features are dead: run {{ $labels.run_id }}, layer {{ $labels.layer }} "
              "{{ $labels.member }}"),
        Alert("MtcTrainersStarve", 'sum by (run_id) (rate(mtc_stream_wait_seconds_total{stage="trainer"}[15m])) / '
              "sum by (run_id) (rate(mtc_train_seconds_total[15m])) > 0.8", 30, "info",
              "Trainers of run {{ $labels.run_id }} wait for activations most of the time: more model actors help."),
    ),
    "mtc-serving": (
        Alert("MtcServiceErrors", f"sum ({FAILURES}) / sum ({ANSWERS}) > 0.01", 5, "critical",
              "More than 1 % of the requests to encode fail."),
        Alert("MtcServiceSlow", f"histogram_quantile(0.99, sum by (le) ({TOTAL_BUCKETS})) > 5", 10, "warning",
              "One request to encode in a hundred takes more than five seconds."),
        Alert("MtcServiceOverloaded", f"sum ({REFUSALS}) / sum ({ANSWERS}) > 0.05", 10, "warning",
              "More than 5 % of the requests to encode are refused with 429."),
        Alert("MtcRunUnusable", f"{UNUSABLE} == 0", 0, "warning",
              "{{ $labels.served }} can't be served and another run answers in its place. GET /readyz says why."),
        Alert("MtcServiceUnseen", 'up{job="mtc-service"} == 0', 5, "critical",
              "A pod of the service gives no metrics: it does not answer, or refuses Prometheus's key."),
        Alert("MtcServiceNotReady", 'kuberay_service_condition_ready{name=~"mtc.*", condition="false"} == 1', 15,
              "critical", "RayService {{ $labels.name }} has had no pod that answers for a quarter of an hour."),
    ),
    "mtc-cluster": (
        Alert("MtcJobFailed",
              'kuberay_job_deployment_status{name=~"mtc.*", deployment_status=~"Failed|ValidationFailed"} == 1', 0,
              "critical", "RayJob {{ $labels.name }} has failed, and is not tried again."),
        Alert("MtcJobPending",
              'kuberay_job_deployment_status{name=~"mtc.*", deployment_status=~"Initializing|Waiting"} == 1', 15,
              "warning", "RayJob {{ $labels.name }} has waited a quarter of an hour for its pods."),
        Alert("MtcJobQueued", 'kuberay_job_deployment_status{name=~"mtc.*", deployment_status="Suspended"} == 1', 240,
              "info", "RayJob {{ $labels.name }} has waited four hours in its queue."),
        Alert("MtcJobUnseen", 'kuberay_job_deployment_status{name=~"mtc.*", deployment_status="Running"} '
              "unless on (namespace) mtc_job_stage", 15, "warning",
              "RayJob {{ $labels.name }} runs, and nothing is heard of its driver."),
        Alert("MtcNodeUnseen", 'up{job="ray"} == 0', 5, "warning",
              "The Ray node of pod {{ $labels.pod }} gives no metrics."),
    ),
}  # fmt: skip


def expressions() -> list[str]:
    """Every expression of a dashboard or an alert."""
    panels = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
    queries = [query.expression for panel in panels for query in panel.queries]
    return queries + [alert.expression for alerts in ALERTS.values() for alert in alerts]


def rules() -> dict[str, Any]:
    """Groups of rules, as Prometheus reads them from a file and as a PrometheusRule holds them."""
    return {
        "groups": [
            {
                "name": "mtc-recorded",
                "rules": [{"record": made.name, "expr": made.expression} for made in RECORDED],
            },
            *(
                {
                    "name": name,
                    "rules": [
                        {
                            "alert": alert.name,
                            "expr": alert.expression,
                            "for": f"{alert.minutes}m",
                            "labels": {"severity": alert.severity},
                            "annotations": {
                                "summary": alert.summary,
                                "runbook_url": f"{RUNBOOKS}#{alert.name.lower()}",
                            },
                        }
                        for alert in alerts
                    ],
                }
                for name, alerts in ALERTS.items()
            ),
        ]
    }


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports; it asks which Prometheus to use."""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    ]
    if dashboard.by_run:
        query = "label_values(mtc_train_target_steps, run_id)"
        variables.append(
            {"name": "run_id", "type": "query", "label": "Run", "datasource": _SOURCE, "query": query, "refresh": 2}
            | {"includeAll": True, "multi": True, "current": {"text": "All", "value": "$__all"}}
        )
    return {
        "uid": f"mtc-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["mtc"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    custom = {"fillOpacity": 30 if panel.stacked else 5, "stacking": {"mode": "normal" if panel.stacked else "none"}}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"x": 8 * (number % 3), "y": 8 * (number // 3), "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query.expression, "legendFormat": query.legend, "datasource": _SOURCE}
            for i, query in enumerate(panel.queries)
        ],
    }


def files() -> dict[str, str]:
    """Content by name."""
    made = {f"dashboard-{d.name}.json": json.dumps(dashboard_json(d), indent=1) + "\n" for d in DASHBOARDS}
    groups = rules()
    custom = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "mtc"}}
    for name, content in {"rules.yaml": groups, "prometheus-rule.yaml": custom | {"spec": groups}}.items():
        made[name] = "# Made by generate.py.\n" + yaml.safe_dump(content, sort_keys=False, width=110)
    return made


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content)
