"""Metrics, dashboards, alerts: what is exported, what is asked for, and what Prometheus's own tools say of it."""

import importlib.util
import re
import subprocess
import sys
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
    for expression in generate.expressions():
        selected = re.findall(r"\b((?:ray_)?mtc_\w+|ray_\w+)(\{[^}]*\})?", expression)
        assert selected, expression
        for name, selector in selected:
            if name in generate.RAY:
                continue
            base = re.sub("_bucket$", "", name)
            assert base in exported, f"{name} in {expression}"
            assert (base != name) is (exported[base].kind == "histogram"), expression
            labels = set(re.findall(r"(\w+)\s*=", selector))
            assert labels <= set(exported[base].labels), f"{selector} of {name}"
        grouped = {label.strip() for by in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in by.split(",")}
        known = {
            label for name, _ in selected for label in getattr(exported.get(re.sub("_bucket$", "", name)), "labels", ())
        }
        assert grouped <= known | {"le", "instance", "WorkerId", "NodeAddress", "Location"}, expression


def test_every_metric_of_the_job_and_the_service_is_looked_at() -> None:
    asked = " ".join(generate.expressions())
    unseen = {i.name for i in (*JOB, *SERVICE) if not re.search(rf"\b{i.name}(_bucket)?\b", asked)}
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


SERIES: dict[str, dict[str, str]] = yaml.safe_load("""
MtcTrainingStalled:
  mtc_job_stage{run_id="a",stage="train"}: 1+0x60
  mtc_last_progress_timestamp_seconds{run_id="a"}: 60+0x60
MtcCheckpointsOld:
  mtc_job_stage{run_id="a",stage="train"}: 1+0x60
  mtc_last_checkpoint_timestamp_seconds{run_id="a"}: 60+0x60
MtcTrainersRestart:
  mtc_events_total{run_id="a",kind="failure"}: 0+1x60
MtcStepsSkipped:
  mtc_train_skipped_steps_total{run_id="a",layer="9"}: 0+2x60
MtcFeaturesDead:
  mtc_dead_features{run_id="a",layer="9",member="k16",group="0"}: 30+0x60
  mtc_features{run_id="a",layer="9",member="k16",group="0"}: 100+0x60
  mtc_dead_features{run_id="a",layer="9",member="k64",group="0"}: 0+0x60
  mtc_features{run_id="a",layer="9",member="k64",group="0"}: 100+0x60
MtcTrainersStarve:
  mtc_stream_wait_seconds_total{run_id="a",stage="trainer"}: 0+55x60
  mtc_train_seconds_total{run_id="a",part="waiting"}: 0+60x60
MtcServiceErrors:
  mtc_encode_requests_total{code="500",pod="x"}: 0+6x60
  mtc_encode_requests_total{code="200",pod="x"}: 0+60x60
  mtc_encode_requests_total{code="200",pod="y"}: 0+60x60
MtcServiceSlow:
  mtc_encode_duration_seconds_bucket{stage="total",le="5"}: 0+50x60
  mtc_encode_duration_seconds_bucket{stage="total",le="10"}: 0+60x60
  mtc_encode_duration_seconds_bucket{stage="total",le="+Inf"}: 0+60x60
MtcServiceOverloaded:
  mtc_encode_requests_total{code="429"}: 0+6x60
  mtc_encode_requests_total{code="200"}: 0+60x60
MtcRunUnusable:
  mtc_served_name_usable{served="production"}: 1+0x10 0+0x50
""")
"""For each alert, series of one value a minute that raise it within an hour."""


@needs_promtool
def test_alerts_are_raised_by_what_they_describe_and_by_nothing_else(tmp_path: Path) -> None:
    alerts = {alert.name: alert for group in generate.ALERTS.values() for alert in group}
    assert SERIES.keys() == alerts.keys()
    tests = []
    for raised, series in SERIES.items():
        labels = {"run_id": "a"} if any("run_id" in name for name in series) else {}
        if raised == "MtcFeaturesDead":
            labels |= {"layer": "9", "member": "k16"}
        if raised == "MtcRunUnusable":
            labels["served"] = "production"
        expected = {"exp_labels": labels | {"severity": alerts[raised].severity}}
        summary = alerts[raised].summary
        for name, value in labels.items():
            summary = summary.replace("{{ $labels.%s }}" % name, value)  # noqa: UP031
        expected["exp_annotations"] = {"summary": summary}
        checks = [
            {"eval_time": "60m", "alertname": name, "exp_alerts": [expected] if name == raised else []}
            for name in alerts
        ]
        given = [{"series": name, "values": values} for name, values in series.items()]
        tests.append({"interval": "1m", "input_series": given, "alert_rule_test": checks})
    file = tmp_path / "alerts.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "rules.yaml")], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
