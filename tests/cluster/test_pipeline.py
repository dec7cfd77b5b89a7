"""The main job as a user runs it: a real `ray start --head`, `ray job submit`, the service, HTTP."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import prometheus
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from kustomize import find, pods

from mtc.analysis import recompute as evaluation
from mtc.config import load_preset
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import Progress, RunError, open_run
from mtc.text import TokenStore, work_units
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


def test_interrupted_and_killed_run_trains_every_token_once(tmp_path):
    """The job's entrypoint, as the operator starts it: by a shell, with the pod's environment, a small run in the place
    of the mounted one and a Ray of its own. Ctrl-C: no process left, no run that a reader would pick up. The same
    command then continues from the last checkpoint, loses its trainer to SIGKILL, and ends with each token trained
    once, and says what happened."""
    runs, mounted = tmp_path / "storage" / "runs", tmp_path / "run.yaml"
    small = {
        "data": {"num_tokens": 200_000}, "cluster": {"checkpoint_every_steps": 50}, "optimizer": {"backend": "sparse"},
        "analysis": {"loss_tokens": 0}, "output": {"run_id": "cut"},
    }  # fmt: skip
    mounted.write_text(json.dumps(load_preset("tiny", small).model_dump(mode="json", exclude_unset=True)))
    entrypoint = find("local", "RayJob")["spec"]["entrypoint"].replace("/etc/mtc/run.yaml", shlex.quote(str(mounted)))
    command = ["sh", "-c", f"exec {entrypoint}"]  # so that Ctrl-C reaches the job and not only its shell
    pod = next(pods("local", "RayJob")).container
    environment = os.environ | {v["name"]: v["value"] for v in pod["env"] if "value" in v} | {"MTC_STORAGE": str(runs)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    process, output = _start(command, environment)
    _wait_for_another_start(runs / "cut", process)
    assert _addresses_of_the_dashboard(process.pid) == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    text = "".join(output)
    assert process.wait(300) == 130, text
    assert "nothing was published" in text
    deadline = time.monotonic() + 120
    while left := _processes_of_session(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    with pytest.raises(RunError, match="no finished run"):
        open_run(str(runs / "latest"))
    with pytest.raises(RunError, match="not finished"):
        open_run(str(runs / "cut"))

    options = ["--config", str(mounted), "--output.root", str(runs), "--optimizer.lr", "0.1"]
    other = subprocess.run(
        [sys.executable, "jobs/train.py", *options], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert other.returncode == 2
    assert "unfinished run with other values of optimizer.lr" in other.stderr

    process, output = _start(command, environment)
    _wait_for_another_start(runs / "cut", process)
    for pid, name in _processes_of_session(process.pid).items():
        if name.startswith("ray::RayTrainWorker"):
            os.kill(pid, signal.SIGKILL)
    text = "".join(output)
    assert process.wait(300) == 0, text
    assert "failure: trainer 0 died" in text
    assert "each once" in text
    events = [json.loads(line)["event"] for line in text.splitlines() if line.startswith("{")]
    assert events[-1] == "finished"
    run = open_run(str(runs / "latest"))
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert [row["step"] for row in history] == sorted({row["step"] for row in history})
    assert history[-1]["step"] == run.config().total_steps
    progress = Progress(pq.read_table(f"{run.url}/ledger.parquet"))
    assert not len(progress.wrong_units())
    report = run.read("report/layer1_analysis_report.md").decode()
    assert "What happened during the run" in report
    assert "trainer 0 died" in report

    work = work_units(TokenStore.open(json.loads(run.read("analysis.json"))["facts"]["token_store"]), run.config())
    assert progress.finished().tolist() == list(range(len(work.training)))


def _start(command, environment):
    """The process, and its lines as they come."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )  # fmt: skip
    assert process.stdout is not None
    return process, process.stdout


def _wait_for_another_start(run, process, seconds=300.0):
    """Until trainers that were started after this call have completed a checkpoint."""

    def newest():
        found = [path.parent.name.split("-") for path in run.glob("checkpoints/step-*/checkpoint.json")]
        return max(((int(words[1]), words[2]) for words in found), default=(0, ""))[1]

    before, deadline = newest(), time.monotonic() + seconds
    while newest() == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _addresses_of_the_dashboard(session: int) -> set[str]:
    """What the dashboard's pages are served on."""
    (pid, line), *_ = [item for item in _processes_of_session(session).items() if "dashboard/dashboard.py" in item[1]]
    port = int(re.search(r"--port=(\d+)", line)[1])
    sockets = psutil.Process(pid).net_connections("tcp")
    ports = range(port, port + 50)  # where another Ray has the first one, the next that is free
    return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port in ports}


def _processes_of_session(session: int) -> dict[int, str]:
    """Command lines of the processes that the session leader started, itself not counted."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            if int(fields[3]) == session and fields[0] != "Z" and pid != session:
                found[pid] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it ended while we looked
    return found
