"""The main job as a user runs it: a real `ray start --head`, `ray job submit`, the service, HTTP."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import prometheus
import pytest
import torch

from mtc.analysis import recompute as evaluation
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import open_run
from mtc.transcoder import load_transcoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head of its own for `make quickstart`, which takes the one that runs."""
    from jobs import quickstart

    original = quickstart.STATE
    quickstart.STATE = tmp_path_factory.mktemp("head") / "state" / "head.json"
    try:
        head = quickstart.start_head()
        yield head
    finally:
        quickstart.stop_head()
        quickstart.STATE = original
    assert not quickstart._processes(head)


@pytest.fixture(scope="module")
def scraped(head, tmp_path_factory):
    """A Prometheus that watches the head from before the job on, by the quickstart's own file; None without one."""
    from jobs import quickstart

    if not prometheus.found():
        yield None
        return
    with prometheus.running(quickstart.STATE.with_name("prometheus.yml"), tmp_path_factory.mktemp("prometheus")) as at:
        yield at


@pytest.fixture(scope="module")
def served(head, scraped, tmp_path_factory):
    """`make quickstart` with the tiny preset and directories of its own."""
    from jobs import quickstart

    root = tmp_path_factory.mktemp("pipeline")
    assert quickstart.main(["run", "--preset", "tiny", "--root", str(root / "runs")]) == 0
    return f"http://127.0.0.1:{head['http_port']}", open_run(str(root / "runs" / "latest"))


def test_job_trains_analyses_and_publishes(served):
    _, run = served
    config = run.config()
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert history[-1]["step"] == config.total_steps == 32
    assert [row["step"] for row in history] == sorted({row["step"] for row in history})
    assert history[-1]["loss"] < history[0]["loss"]
    names = set(run.manifest().files)
    report = {"layer1_analysis_report.md", "layer1_analysis_report.html", "layer1_analysis_report.json"}
    report |= {"layer1_analysis_overview.png", "activation_vs_samples.png", "activation_vs_samples.svg"}
    assert {"config.yaml", "transcoder.safetensors", "examples.parquet", "analysis.json"} <= names
    assert {f"report/{name}" for name in report} <= names


def test_recomputation_from_the_run_directory_agrees(served, capsys):
    _, run = served
    code, said = evaluation.main([run.url]), capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "fvu[64]" in said.out


def test_encode_equals_an_offline_forward(served):
    base, run = served
    text = "We the people of the United States"
    answer = httpx.post(f"{base}/encode", json={"inputs": text, "top_k": 4}, timeout=60).json()
    config, transcoder = run.config(), load_transcoder(run)
    tokenizer = load_tokenizer(config.model)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    (pair,) = LanguageModel(config.model).capture(pack_windows([np.array(ids, np.int32)], []))
    with torch.no_grad():
        activations = transcoder.encode(pair.source)
    (result,) = answer["results"]
    assert result["token_ids"] == ids
    assert result["is_special"][0]
    for features, row in zip(result["features"][1:], activations[1:], strict=True):
        expected = row.topk(4)
        values = [v for v in expected.values.tolist() if v > 0]
        assert [f["activation_value"] for f in features] == pytest.approx(values, rel=1e-4)
        chosen = [f["feature_index"] for f in features]
        assert row[chosen].tolist() == pytest.approx(values, rel=1e-4)


def test_report_over_http(served):
    base, run = served
    markdown = httpx.get(f"{base}/report", timeout=30)
    assert markdown.status_code == 200
    assert markdown.content == run.read("report/layer1_analysis_report.md")
    browser = httpx.get(f"{base}/report", headers={"Accept": "text/html,*/*;q=0.8"}, timeout=30)
    assert browser.content == run.read("report/layer1_analysis_report.html")
    as_json = httpx.get(f"{base}/report", headers={"Accept": "application/json"}, timeout=30).json()
    assert as_json["evaluation"]["fvu"] == json.loads(run.read("analysis.json"))["evaluation"]["fvu"]
    picture = httpx.get(f"{base}/report/files/layer1_analysis_overview.png", timeout=30)
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == run.read("report/layer1_analysis_overview.png")


def test_what_dashboards_ask_for_is_there(served, scraped):
    """A real Prometheus scraped the job, Ray's agents and the service: every diagram has lines to draw."""
    if scraped is None:
        pytest.skip("Debian's prometheus is not installed")
    base, run = served
    assert httpx.post(f"{base}/encode", json={"inputs": []}, timeout=30).status_code == 400
    rates = "sum by (code) (rate(mtc_encode_requests_total[30s]))"
    deadline = time.monotonic() + 60
    while not any(s["metric"] == {"code": "400"} for s in prometheus.series(scraped, rates, time.time(), time.time())):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    end = time.time() + 1
    start = end - 300
    for name, job in {"up": "mtc-job", "mtc_encode_tokens_total": "mtc-service"}.items():
        assert prometheus.series(scraped, f'{name}{{job="{job}"}}', start, end)
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "k8s" / "monitoring").glob("dashboard-*.json"))]
    empty = []
    for panel in (panel for board in boards for panel in board["panels"]):
        shown = 0
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "30s").replace("$run_id", run.run_id)
            lines = prometheus.series(scraped, expression, start, end)
            shown += len(lines)
            if not lines:
                empty.append(target["expr"])
        assert shown, panel["title"]
    assert empty == ['sum by (kind) (increase(mtc_events_total{run_id=~"$run_id"}[$__rate_interval]))'], "all went well"
    # And they are the run's: what the job says last is what it has written.
    (tokens,) = prometheus.series(scraped, f'mtc_train_tokens_total{{run_id="{run.run_id}"}}', start, end)
    row = json.loads(run.read("metrics.jsonl").decode().splitlines()[-1])
    assert float(tokens["values"][-1][1]) == row["tokens"]
    for prefix, fvu in zip(run.config().transcoder.prefixes, row["fvu"], strict=True):
        (line,) = prometheus.series(scraped, f'mtc_fvu_ratio{{run_id="{run.run_id}", prefix="{prefix}"}}', start, end)
        assert float(line["values"][-1][1]) == pytest.approx(fvu)
    # Each process says its own part through Ray's agent.
    (trainer,) = prometheus.series(scraped, f'ray_mtc_trainer_tokens_total{{run_id="{run.run_id}"}}', start, end)
    assert float(trainer["values"][-1][1]) == row["tokens"]


def test_without_a_hub_the_reference_preset_fails_fast_and_says_why():
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "jobs/train.py", "--preset", "gemma-2-2b-layer17"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"},  # refuses connections, as without a network
    )
    assert done.returncode == 2
    assert "network" in done.stderr
    assert "google/gemma-2-2b" in done.stderr
    assert "Ray" not in done.stderr, "nothing was started"
