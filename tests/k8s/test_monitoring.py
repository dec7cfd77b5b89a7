"""Metrics, dashboards, alerts: what is exported, what is asked for, and what Prometheus's own tools say of it."""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import prometheus
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.job_metrics import JobMetrics
from mtc.config import ConfigError, load_preset
from mtc.telemetry import CATALOGUE, JOB
from mtc.telemetry.metrics import PROCESS, RAY_PREFIX, SERVICE

MONITORING = Path(__file__).parents[2] / "k8s" / "monitoring"
needs_promtool = pytest.mark.skipif(not prometheus.found(), reason="Debian's prometheus is not installed")


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", MONITORING / "generate.py")
    assert spec and spec.loader
    module = sys.modules["generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


def test_names_follow_the_convention() -> None:
    for instrument in CATALOGUE.values():
        assert re.fullmatch(r"mtc_[a-z0-9_]+", instrument.name)
        assert instrument.name.endswith("_total") is (instrument.kind == "counter")
        assert (instrument.kind == "histogram") is bool(instrument.buckets)
        assert list(instrument.buckets) == sorted(instrument.buckets)
        assert not {"le", "instance", "job"} & set(instrument.labels)
    assert len(CATALOGUE) == len(JOB) + len(PROCESS) + len(SERVICE), "a name is used twice"


def test_files_are_those_that_the_code_makes() -> None:
    for name, content in generate.files().items():
        assert (MONITORING / name).read_text() == content, "run: python k8s/monitoring/generate.py"


def test_every_panel_and_rule_asks_for_what_is_exported() -> None:
    exported = {instrument.name: instrument for instrument in (*JOB, *SERVICE)}
    exported |= {RAY_PREFIX + instrument.name: instrument for instrument in PROCESS}
    known = {name: set(instrument.labels) for name, instrument in exported.items() if instrument.kind != "histogram"}
    known |= {f"{n}_bucket": {"le", *i.labels} for n, i in exported.items() if i.kind == "histogram"}
    known |= {name: set(labels) for name, labels in generate.OTHERS.items()}
    known |= {made.name: set().union(*(known[name] for name, _ in asked_for(made.expression)))
              for made in generate.RECORDED}  # fmt: skip
    for expression in [*generate.expressions(), *(made.expression for made in generate.RECORDED)]:
        selected = asked_for(expression)
        assert selected, expression
        for name, selector in selected:
            assert name in known, f"{name} in {expression}"
            assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= known[name], f"{selector} of {name}"
        grouped = {label.strip() for by in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in by.split(",")}
        labels = set().union(*(known[name] for name, _ in selected))
        assert grouped <= labels | {"instance", "namespace", "WorkerId", "NodeAddress", "Location"}, expression


def asked_for(expression: str) -> list[tuple[str, str]]:
    """The series of an expression, each with its selector."""
    without = re.sub(r"\b(by|on|without|group_left|group_right) \([^)]*\)", "", expression)
    found = re.findall(r"(?<![\w.])([a-zA-Z_:][\w:]*)(\{[^}]*\})?", re.sub(r"\[[^\]]*\]", "", without))
    inside = {word for _, selector in found for word in re.findall(r"\w+", selector)}
    words = {"sum", "max", "avg", "rate", "increase", "deriv", "time", "histogram_quantile", "and", "unless", "offset"}
    return [(name, selector) for name, selector in found if name not in words | inside]


def test_others_metrics_are_named_as_they_are() -> None:
    """Ray's by the list of its agent; those of KubeRay and DCGM were looked up in their sources."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    agents = {name for name in generate.OTHERS if name.startswith("ray_")} - {"ray_object_store_memory"}
    assert {name.removeprefix("ray_") for name in agents} <= METRICS_GAUGES.keys()
    for name in agents:
        tags = (
            set(METRICS_GAUGES[name.removeprefix("ray_")].tags)
            if hasattr(METRICS_GAUGES[name.removeprefix("ray_")], "tags")
            else None
        )
        assert tags is None or set(generate.OTHERS[name]) <= tags, name
    asked = {name for text in generate.expressions() for name, _ in asked_for(text)}
    assert generate.OTHERS.keys() <= asked


def test_every_metric_of_the_job_and_the_service_is_looked_at() -> None:
    asked = {name for text in generate.expressions() for name, _ in asked_for(text)}
    recorded = {made.name: asked_for(made.expression) for made in generate.RECORDED}
    asked |= {name for made in asked & recorded.keys() for name, _ in recorded[made]}
    unseen = {i.name for i in (*JOB, *SERVICE)} - {name.removesuffix("_bucket") for name in asked}
    assert unseen == {"mtc_job_info"}, "which says what the run is, not how it goes"


@needs_promtool
def test_promtool_accepts_rules_and_queries(tmp_path: Path) -> None:
    queries = [text.replace("$__rate_interval", "5m").replace("$run_id", "a") for text in generate.expressions()]
    recorded = [{"record": f"query:number_{i}", "expr": text} for i, text in enumerate(queries)]
    every = tmp_path / "queries.yaml"
    every.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": recorded}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(MONITORING / "rules.yaml"), str(every)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


@needs_promtool
def test_pods_totals_are_taken_once_and_clusters_added_up(tmp_path: Path) -> None:
    """Three pods, each of which tells its cluster's total: two of one cluster, and one of another that takes over."""
    pods = {("old", "a"): 60, ("old", "b"): 60, ("new", "c"): 30}
    series, expected = [], {}
    for instrument in SERVICE:
        name = instrument.name + "_bucket" * (instrument.kind == "histogram")
        for (cluster, pod), each in pods.items():
            where = f'namespace="mtc",pod="{pod}",instance="{pod}:8000",ray_cluster="{cluster}"'
            growth = f"{each}+0x20" if instrument.kind == "gauge" else f"0+{each}x20"
            series.append({"series": f'{name}{{{where},job="mtc-service"}}', "values": growth})
        expected[generate.recorded(instrument.name)] = 90.0 if instrument.kind == "gauge" else 1.5
    checks = [
        {"expr": name, "eval_time": "15m", "exp_samples": [{"labels": f'{name}{{job="mtc-service"}}', "value": value}]}
        for name, value in expected.items()
    ]
    assert len(checks) == len(SERVICE)
    promtool_test(tmp_path, [{"interval": "1m", "input_series": series, "promql_expr_test": checks}])


def promtool_test(directory: Path, tests: list[dict[str, Any]]) -> None:
    file = directory / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "rules.yaml")], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def headings(page: str) -> list[str]:
    return re.findall(r"^## (\w+)$", page, re.M)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    page = (MONITORING.parents[1] / "docs" / "runbooks.md").read_text()
    alerts = [alert.name for group in generate.ALERTS.values() for alert in group]
    assert headings(page) == alerts, "in the order of the rules"
    for text in re.split(r"^## ", page, flags=re.M)[1:]:
        assert "```sh\n" in text, f"what to type: {text[:40]}"
    groups = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    urls = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert urls == [f"{generate.RUNBOOKS}#{name.lower()}" for name in alerts]


SERIES: dict[str, dict[str, str]] = yaml.safe_load("""
MtcTrainingStalled:
  mtc_job_stage{run_id="a",stage="train"}: 1+0x80
  mtc_last_progress_timestamp_seconds{run_id="a"}: 60+0x80
  mtc_last_checkpoint_timestamp_seconds{run_id="a"}: 0+60x80
MtcStageStalled:
  mtc_job_stage{run_id="a",stage="prepare"}: 0+0x80
  mtc_job_stage{run_id="a",stage="tokenise"}: 1+0x80
  mtc_last_progress_timestamp_seconds{run_id="a"}: 60+0x80
MtcCheckpointsMissing:
  mtc_job_stage{run_id="a",stage="train"}: 1+0x80
  mtc_last_progress_timestamp_seconds{run_id="a"}: 0+60x80
MtcCheckpointsOld:
  mtc_job_stage{run_id="a",stage="train"}: 1+0x80
  mtc_last_checkpoint_timestamp_seconds{run_id="a"}: 60+0x80
MtcTrainersRestart:
  mtc_events_total{run_id="a",kind="failure"}: 0+1x80
MtcStepsSkipped:
  mtc_train_skipped_steps_total{run_id="a",layer="9"}: 0+2x80
MtcFeaturesDead:
  mtc_dead_features{run_id="a",layer="9",member="k16",group="0"}: 30+0x80
  mtc_features{run_id="a",layer="9",member="k16",group="0"}: 100+0x80
  mtc_dead_features{run_id="a",layer="9",member="k64",group="0"}: 0+0x80
  mtc_features{run_id="a",layer="9",member="k64",group="0"}: 100+0x80
MtcTrainersStarve:
  mtc_stream_wait_seconds_total{run_id="a",stage="trainer"}: 0+55x80
  mtc_train_seconds_total{run_id="a",part="waiting"}: 0+60x80
MtcServiceErrors:
  mtc_encode_requests_total{code="500",pod="x"}: 0+6x80
  mtc_encode_requests_total{code="200",pod="x"}: 0+60x80
  mtc_encode_requests_total{code="200",pod="y"}: 0+60x80
MtcServiceSlow:
  mtc_encode_duration_seconds_bucket{stage="total",le="5"}: 0+50x80
  mtc_encode_duration_seconds_bucket{stage="total",le="10"}: 0+60x80
  mtc_encode_duration_seconds_bucket{stage="total",le="+Inf"}: 0+60x80
MtcServiceOverloaded:
  mtc_encode_requests_total{code="429"}: 0+6x80
  mtc_encode_requests_total{code="200"}: 0+60x80
MtcRunUnusable:
  mtc_served_name_usable{served="production"}: 1+0x10 0+0x70
MtcServiceUnseen:
  up{job="mtc-service",pod="x"}: 1+0x10 0+0x80
  up{job="mtc-service",pod="y"}: 1+0x80
  up{job="mtc-job",pod="x"}: 0+0x80
MtcServiceNotReady:
  kuberay_service_condition_ready{name="mtc",namespace="mtc",condition="false"}: 1+0x80
  kuberay_service_condition_ready{name="theirs",namespace="x",condition="false"}: 1+0x80
MtcJobFailed:
  kuberay_job_deployment_status{name="mtc-train",namespace="mtc",deployment_status="Failed"}: 1+0x80
  kuberay_job_deployment_status{name="theirs",namespace="x",deployment_status="Failed"}: 1+0x80
MtcJobPending:
  kuberay_job_deployment_status{name="mtc-train",namespace="mtc",deployment_status="Initializing"}: 1+0x80
MtcJobQueued:
  kuberay_job_deployment_status{name="mtc-train",namespace="mtc",deployment_status="Suspended"}: 1+0x300
MtcJobUnseen:
  kuberay_job_deployment_status{name="mtc-train",namespace="mtc",deployment_status="Running"}: 1+0x80
  mtc_job_stage{run_id="b",stage="train",namespace="elsewhere"}: 0+0x80
MtcNodeUnseen:
  up{job="ray",pod="x"}: 1+0x10 0+0x80
""")
"""For each alert, series of one value a minute that raise it within 70 minutes, or as long as it waits."""
RAISED_LABELS = {
    "MtcFeaturesDead": {"layer": "9", "member": "k16"},
    "MtcRunUnusable": {"served": "production"},
    "MtcServiceUnseen": {"job": "mtc-service", "pod": "x"},
    "MtcServiceNotReady": {"name": "mtc", "namespace": "mtc", "condition": "false"},
    "MtcJobFailed": {"name": "mtc-train", "namespace": "mtc", "deployment_status": "Failed"},
    "MtcJobPending": {"name": "mtc-train", "namespace": "mtc", "deployment_status": "Initializing"},
    "MtcJobQueued": {"name": "mtc-train", "namespace": "mtc", "deployment_status": "Suspended"},
    "MtcJobUnseen": {"name": "mtc-train", "namespace": "mtc", "deployment_status": "Running"},
    "MtcNodeUnseen": {"job": "ray", "pod": "x"},
    "MtcStageStalled": {},
    "MtcCheckpointsMissing": {"stage": "train"},
}


@needs_promtool
def test_alerts_are_raised_by_what_they_describe_and_by_nothing_else(tmp_path: Path) -> None:
    alerts = {alert.name: alert for group in generate.ALERTS.values() for alert in group}
    assert SERIES.keys() == alerts.keys()
    tests = []
    for raised, series in SERIES.items():
        labels = {"run_id": "a"} if any('run_id="a"' in name for name in series) else {}
        labels |= RAISED_LABELS.get(raised, {})
        expected: dict[str, Any] = {"exp_labels": labels | {"severity": alerts[raised].severity}}
        summary = alerts[raised].summary
        for name, value in labels.items():
            summary = summary.replace("{{ $labels.%s }}" % name, value)  # noqa: UP031
        url = f"{generate.RUNBOOKS}#{raised.lower()}"
        expected["exp_annotations"] = {"summary": summary, "runbook_url": url}
        minutes = 70 if alerts[raised].minutes < 60 else alerts[raised].minutes + 5
        checks = [
            {"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": [expected] if name == raised else []}
            for name in alerts
        ]
        given = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"interval": "1m", "input_series": given, "alert_rule_test": checks})
    promtool_test(tmp_path, tests)


def row(step: int, skipped: int = 0) -> dict[str, Any]:
    figures = {"loss": 0.5, "fvu": [0.9, 0.8, 0.7], "l0": 8.0, "dead": 3, "dead_groups": [1, 0, 2], "lr": 1e-3}
    return figures | {
        "member": "layer1",
        "layer": 1,
        "step": step,
        "gradient_norm": 1.0,
        "skipped": skipped,
        "time": 1e9 + step,
    }


def account(rank: int, tokens: int) -> dict[str, Any]:
    seconds = {"waiting": 1.0, "transport": 0.25, "step": 2.0, "all_reduce": 0.5, "checkpoint": 0.0, "other": 0.25}
    model = {"forward": 3.0, "sending": 0.5, "idle": 1.5}
    steps = {"step_seconds": [0.2, 0.4], "positions": 2 * tokens}
    return {"rank": rank, "tokens": tokens, "seconds": seconds, "model_seconds": model} | steps


def scrape(url: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(httpx.get(url, timeout=10).text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "run_id" and value}
            assert sample.labels["run_id"] == "a-run"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def test_the_jobs_endpoint_adds_up_what_ranks_say_through_restarts() -> None:
    config = load_preset("tiny", {"cluster": {"metrics_port": 0}})
    metrics = JobMetrics(config, "a-run")
    with metrics.served():
        url = metrics.url
        assert url is not None
        assert scrape(url)["mtc_train_tokens_total", ()] == 0.0, "a rate needs the zero"
        began = time.time()
        metrics.tokenised({"train": 640, "heldout": 64})
        before = scrape(url)
        assert before["mtc_tokenised_tokens", (("split", "train"),)] == 640
        assert before["mtc_tokenise_target_tokens", (("split", "train"),)] >= config.data.num_tokens
        assert before["mtc_last_progress_timestamp_seconds", ()] >= began
        for rank in (0, 1):
            metrics.account(account(rank, 512))
        metrics.row(row(20, skipped=2))
        first = scrape(url)
        assert first["mtc_train_tokens_total", ()] == 1024
        assert first["mtc_stream_tokens_total", ()] == 2048
        assert first["mtc_train_seconds_total", (("part", "step"),)] == 4.0
        assert first["mtc_stream_wait_seconds_total", (("stage", "trainer"),)] == 2.0
        assert first["mtc_stream_wait_seconds_total", (("stage", "model_actor"),)] == 3.0
        assert first["mtc_train_step_duration_seconds_count", ()] == 2, "of the first rank alone"
        assert first["mtc_dead_features", (("group", "2"), ("layer", "1"))] == 2
        assert first["mtc_fvu_ratio", (("layer", "1"), ("prefix", str(config.transcoder.prefixes[1])))] == 0.8
        metrics.stage("analyse")
        assert scrape(url)["mtc_last_progress_timestamp_seconds", ()] >= began, "any stage gets on, not only training"
        metrics.event({"kind": "checkpoint", "time": "2026-01-02T03:04:05+00:00", "message": "", "step": 20})
        metrics.event({"kind": "resume", "time": "2026-01-02T03:05:00+00:00", "message": "", "step": 10, "undone": 10})
        metrics.account(account(0, 100))
        metrics.row(row(11, skipped=2))
        second = scrape(url)
        counters = [key for key in first if CATALOGUE.get(key[0]) and CATALOGUE[key[0]].kind == "counter"]
        assert len(counters) > 10
        assert all(second[key] >= first[key] for key in counters)
        assert second["mtc_train_step", ()] == 11, "it shows that steps were undone"
        assert second["mtc_train_repeated_steps_total", ()] == 10
        assert second["mtc_train_skipped_steps_total", (("layer", "1"),)] == 2
        assert second["mtc_last_checkpoint_timestamp_seconds", ()] == 1767323045
        assert second["mtc_events_total", (("kind", "resume"),)] == 1
        taken = load_preset("tiny", {"cluster": {"metrics_port": int(url.split(":")[2].split("/")[0])}})
        with (
            pytest.raises(ConfigError, match=r"cluster.metrics_port=\d+: cannot listen on 127.0.0.1"),
            JobMetrics(taken, "other").served(),
        ):
            pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=5)


def test_no_port_is_opened_unless_it_is_asked_for() -> None:
    metrics = JobMetrics(load_preset("tiny"), "a-run")
    with metrics.served():
        assert metrics.url is None
