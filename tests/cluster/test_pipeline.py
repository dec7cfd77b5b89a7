"""The main job as users run it: a run of two layers that Ctrl-C interrupts on CPUs, in a Ray of its own, and that the
quickstart finishes on a `ray start --head` that believes in three GPUs and has a small object store, where a trainer of
two is killed; then the service, HTTP, Prometheus.

The head's processes run on the CPU what is written for a GPU (mtc.devices.PRETENDING): the plan, Ray's and Ray Train's
rules for processes with GPUs, streams and uploads, the choice of entries without the host, two trainers. What only CUDA
can tell is in benchmarks/gpu.py.
"""

import json
import os
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from functools import partial
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import prometheus
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from kustomize import find, pods
from report_pages import without_links
from wide_model import WIDTH, make_wide_model

from cluster.pipeline import check
from mtc.analysis import recompute
from mtc.config import ConfigError, load_preset, make_config
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.results import PARTS, Analysis
from mtc.storage import Checkpoints, Progress, RunDirectory, RunError, open_layer_run, open_run
from mtc.telemetry.metrics import CIRCUITS
from mtc.text import TokenStore, heldout_units, work_units
from mtc.transcoder import load_transcoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TOKENS, REPLAYS = 150_000, 2
SETTINGS = {
    "model": {"dtype": "float32", "compile": False, "layers": [1, {"layer": 0, "source": "mlp_in"}]},
    "data": {"num_tokens": TOKENS, "replays": REPLAYS}, "optimizer": {"batch_tokens": 256 * REPLAYS},
    "cluster": {"checkpoint_every_steps": 30},
}  # fmt: skip
RUN_ID = "cut"
STORE_BYTES = 120_000_000


class Interrupted(NamedTuple):
    file: Path
    """The mounted configuration."""
    root: Path
    """Where the pod keeps its runs."""
    code: int
    said: str
    dashboard: set[str]
    """Addresses on which it was served."""
    left: dict[int, str]
    """Processes that were there two minutes after the end, by number."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    wide = make_wide_model(tmp_path_factory.mktemp("wide") / "model")
    return SETTINGS | {"model": SETTINGS["model"] | {"name": wide}}


@pytest.fixture(scope="module")
def interrupted(settings, tmp_path_factory):
    """The job's entrypoint, as the operator starts it: by a shell, with the pod's environment, a small run in the place
    of the mounted one; Ctrl-C comes after a checkpoint."""
    directory = tmp_path_factory.mktemp("interrupted")
    root, mounted = directory / "storage" / "runs", directory / "run.yaml"
    # Relative here, absolute where the quickstart continues the run, from another working directory.
    model = settings["model"] | {"name": os.path.relpath(settings["model"]["name"], ROOT)}
    config = load_preset("tiny", settings | {"model": model, "output": {"run_id": RUN_ID}})
    mounted.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    entrypoint = find("local", "RayJob")["spec"]["entrypoint"].replace("/etc/mtc/run.yaml", shlex.quote(str(mounted)))
    command = ["sh", "-c", entrypoint]
    pod = next(pods("local", "RayJob")).container
    environment = os.environ | {v["name"]: v["value"] for v in pod["env"] if "value" in v} | {"MTC_STORAGE": str(root)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )  # fmt: skip

    def alive():
        assert process.poll() is None, process.communicate()[0]
        return True

    wait_for_another_start(root / RUN_ID, alive)
    dashboard = addresses_of_the_dashboard(process.pid)
    (job,) = psutil.Process(process.pid).children()
    job.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    deadline = time.monotonic() + 120
    while (left := processes_of_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return Interrupted(mounted, root, process.returncode, said, dashboard, left)


def test_an_interrupted_job_leaves_no_process_and_no_run_that_a_reader_would_take(interrupted):
    assert interrupted.code == 130, interrupted.said
    assert "nothing was published" in interrupted.said
    assert interrupted.dashboard == {"127.0.0.1"}
    assert not interrupted.left
    with pytest.raises(RunError, match="no finished run"):
        open_run(str(interrupted.root / "latest"))
    with pytest.raises(RunError, match="not finished"):
        open_run(str(interrupted.root / RUN_ID))


def test_an_unfinished_run_is_not_continued_with_other_settings(interrupted, monkeypatch):
    """Before any cluster is started."""
    monkeypatch.chdir(ROOT)
    changes = {"optimizer": {"lr": 0.1}, "output": {"root": str(interrupted.root)}, "cluster": {"num_trainers": 2}}
    config = make_config(yaml.safe_load(interrupted.file.read_text()), changes)
    with pytest.raises(ConfigError, match=r"other values of optimizer\.lr \(.+ there, .+ asked\): "):
        check(config)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    from jobs import quickstart

    originals, before = (quickstart.STATE, quickstart.OBJECT_STORE_BYTES), dict(os.environ)
    quickstart.STATE = tmp_path_factory.mktemp("gpu-head") / "state" / "head.json"
    quickstart.OBJECT_STORE_BYTES = STORE_BYTES
    resources = {"CPU": 4, "GPU": 3}
    os.environ.update(MTC_PRETEND_GPU="1", RAY_OVERRIDE_RESOURCES=json.dumps(resources))
    try:
        head = quickstart.start_head()
        os.environ.pop("RAY_OVERRIDE_RESOURCES")
        yield head
    finally:
        quickstart.stop_head()
        left = quickstart._processes(head)
        quickstart.STATE, quickstart.OBJECT_STORE_BYTES = originals
        os.environ.clear()
        os.environ.update(before)
    assert not left


def test_a_copied_checkout_leaves_the_head_alone(head, tmp_path, monkeypatch, capsys):
    from jobs import quickstart

    shutil.copytree(quickstart.STATE.parent, tmp_path / "copy")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(quickstart, "STATE", tmp_path / "copy" / "head.json")
        assert quickstart.main(["stop"]) == 0
    assert capsys.readouterr().out == "nothing was running\n"
    assert quickstart.start_head() == head and len(quickstart._processes(head)) > 3


@pytest.fixture(scope="module")
def scraped(head, tmp_path_factory):
    """A Prometheus that watches the head from before the job on, by the quickstart's own file; None without one."""
    from jobs import quickstart

    if not prometheus.found():
        yield None
        return
    with prometheus.running(quickstart.STATE.with_name("prometheus.yml"), tmp_path_factory.mktemp("prometheus")) as at:
        yield at


class StoreWatch:
    """Samples the figures of a head's object store while it is used as a context."""

    def __init__(self, address):
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(address)
        self._read = lambda: get_memory_info_reply(state).store_stats
        self._stop = threading.Event()
        self._nodes = state.node_table

    def __enter__(self):
        deadline = time.monotonic() + 120
        while not any(node["Alive"] for node in self._nodes()):  # the dashboard answers before the node is there
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self.samples = [self._read()]

        def watch():
            while not self._stop.wait(0.2):
                self.samples.append(self._read())

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.samples.append(self._read())


class Served(NamedTuple):
    base: str
    run: RunDirectory
    """Of the first layer, one of those that are served."""
    said: str
    store: StoreWatch
    """While it was trained and served."""


@pytest.fixture(scope="module")
def served(interrupted, settings, head, scraped):
    """The quickstart finishes the run, by two trainers, of which one is killed after another checkpoint, and serves it,
    without a GPU as always."""
    from jobs import quickstart

    given = [
        f"--{part}.{name}={v if isinstance(v, str) else json.dumps(v)}"
        for part, s in settings.items()
        for name, v in s.items()
    ]
    options = ["run", "--preset", "tiny", "--root", str(interrupted.root), "--run-id", RUN_ID, "--"]
    options += [*given, "--cluster.num_trainers", "2", "--log-format", "json"]
    options += ["--output.keep_checkpoints_after_finish", "true"]
    killed, over = [], threading.Event()

    def kill():
        wait_for_another_start(interrupted.root / RUN_ID, lambda: not over.is_set())
        trainers = []
        for process in quickstart._processes(head):
            with suppress(psutil.NoSuchProcess):  # it ended while we looked
                trainers += [process] * process.name().startswith("ray::RayTrainWo")
        killed.extend(trainers[:1])
        trainers[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with redirect_stdout(StringIO()) as output, StoreWatch(head["address"]) as store:
            code = quickstart.main(options)
    finally:
        over.set()
        killer.join()
    assert code == 0, output.getvalue()
    assert killed
    run = open_layer_run(str(interrupted.root / "latest" / "layer1"))
    port = json.loads(quickstart.STATE.read_text())["http_port"]  # another one if somebody took the head's meanwhile
    return Served(f"http://127.0.0.1:{port}", run, output.getvalue(), store)


def test_every_token_is_trained_twice_and_what_happened_is_told(served):
    _, run, said, _ = served
    assert [json.loads(line)["event"] for line in said.splitlines() if line.startswith("{")][-1] == "finished"
    facts = json.loads(run.read("analysis.json"))["facts"]
    kinds = [event["kind"] for event in facts["events"]]  # the other trainer may or may not fail of the same
    assert [kind for kind, _ in groupby(kinds)] == ["continue", "resume", "failure", "resume"], facts["events"]
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert [row["step"] for row in history] == sorted({row["step"] for row in history})
    assert history[-1]["step"] == run.config().total_steps == TOKENS // 256
    report = run.read("report/layer1_analysis_report.md").decode()
    assert "What happened during the run" in report
    assert re.search("trainer [01] died", report) and re.search("failure: trainer [01] died", said)
    progress = Progress(pq.read_table(f"{run.url}/ledger.parquet"))
    assert not len(progress.wrong_units())
    work = work_units(TokenStore.open(facts["token_store"]), run.config())
    assert progress.finished().tolist() == list(range(len(work.training)))
    captured = progress.captured_tokens()
    wanted = history[-1]["step"] * 256  # tokens of REPLAYS times as large batches
    assert wanted <= captured == facts["captured_tokens"] < wanted + 64
    assert progress.trained_tokens() == facts["trained_tokens"] == REPLAYS * captured
    assert f"{REPLAYS * captured:,} tokens trained, each of {captured:,} {REPLAYS} times" in said
    assert f"trained {REPLAYS * captured:,} tokens ({captured:,} captured, each {REPLAYS} times)" in said
    assert f"{REPLAYS * captured:,} trained tokens ({captured:,} captured)" in report


def test_it_ran_on_a_ray_that_believes_in_gpus(served):
    facts = json.loads(served.run.read("analysis.json"))["facts"]
    assert facts["devices"] == ["cuda"]
    assert facts["num_trainers"] == 2
    assert "1 + 1 transcoders, each with one trainer" in served.said
    checkpoint = Checkpoints(posixpath.dirname(served.run.url)).latest()
    for rank, layer in enumerate((1, 0)):  # as they are listed
        written = {name for name in json.loads(checkpoint.read(f"rank-{rank}.json")) if name.startswith("tra")}
        assert written == {f"{kind}-layer{layer}.safetensors" for kind in ("trainer", "transcoder")}
    chosen = r"(sparse|dense) on cpu \(auto: \w+ [\d.]+ ms, \w+ [\d.]+ ms\)"
    assert re.match(chosen, facts["compute"]), "not chosen again"
    assert facts["language_model_compute"] == ["eager (model.compile=false)"]


def test_cpus_find_the_same_figures_of_what_it_learnt(served, interrupted):
    for layer in (0, 1):
        run = open_layer_run(f"{interrupted.root}/latest/layer{layer}")
        config, analysis = run.config(), json.loads(run.read("analysis.json"))
        store = TokenStore.open(analysis["facts"]["token_store"])
        units = [
            pack_windows(store.input_ids(unit), store.info.special_ids)
            for unit in heldout_units(store, config, config.analysis.num_tokens)
        ]
        again = recompute.evaluate(config, load_transcoder(run), units, [])
        assert analysis["evaluation"]["fvu"] == pytest.approx(list(again.fvu), rel=1e-4)
        assert again.fvu[-1] < 0.7, "nothing was learnt"
        assert again.l0[-1] == pytest.approx(config.transcoder.k, rel=0.1)


def test_job_trains_analyses_and_publishes(served):
    run = served.run
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert history[-1]["loss"] < history[0]["loss"]
    names = set(run.manifest().files)
    report = {"layer1_analysis_report.md", "layer1_analysis_report.html", "layer1_analysis_report.json"}
    report |= {"layer1_analysis_overview.png", "activation_vs_samples.png", "activation_vs_samples.svg"}
    assert {"config.yaml", "transcoder.safetensors", "examples.parquet", "analysis.json"} <= names
    assert {f"report/{name}" for name in report} <= names


def test_two_transcoders_from_one_pass_and_a_report_of_both(served, interrupted):
    run = open_run(str(interrupted.root / "latest"))
    assert run.run_id == RUN_ID
    combined = run.read("report/layers_report.md").decode()
    as_json = {entry["layer"]: entry for entry in json.loads(run.read("report/layers_report.json"))["layers"]}
    assert run.read("report/layers_overview.png")[:4] == b"\x89PNG"
    transcoders = []
    for _, alone in run.config().members():
        layer = alone.model.layer
        own = open_layer_run(f"{interrupted.root}/latest/layer{layer}")
        assert own.run_id == f"{RUN_ID}/layer{layer}"
        assert own.config() == alone
        analysis = Analysis.model_validate_json(own.read("analysis.json"))
        assert analysis.facts.other_layers == (1 - layer,)
        assert analysis.evaluation.loss is not None
        transcoders.append(load_transcoder(own))
        row = next(line for line in combined.splitlines() if line.startswith(f"| [layer {layer}]"))
        assert all(f"{value:.4g}" in row for value in analysis.summary.fvu)
        assert as_json[layer]["summary"]["fvu"] == list(analysis.summary.fvu)
        link = row.split("](")[1].split(")")[0]
        assert (Path(run.url) / "report" / link).resolve().is_file()
        history = [json.loads(line) for line in own.read("metrics.jsonl").decode().splitlines()]
        assert history[-1]["step"] == run.config().total_steps
        assert {line["layer"] for line in history} == {layer}
        assert sum(line["seconds"]["all_reduce"] for line in history) > 0
        assert sum(line["model_seconds"]["forward"] for line in history) > 0
        assert all(value >= 0 for line in history for value in line["seconds"].values())
    assert not torch.equal(transcoders[0].W_enc, transcoders[1].W_enc)
    with pytest.raises(
        RunError, match=rf"transcoders of 2 layers; name one of them: .*/{RUN_ID}/layer1, .*/{RUN_ID}/layer0"
    ):
        open_layer_run(run.url)
    (line,) = (line for line in served.said.splitlines() if line.startswith("layers "))
    assert "0, 1 are served as one" in line and "else layer 0 answers" in line
    whole = httpx.get(f"{served.base}/report", timeout=30)
    assert whole.content == run.read("report/layers_report.md")
    for layer in (0, 1):
        check_encode(served.base, open_layer_run(f"{run.url}/layer{layer}"))


def test_the_stream_is_bounded_by_a_small_object_store(served):
    first, last = served.store.samples[0], served.store.samples[-1]
    capacity = first.object_store_bytes_used + first.object_store_bytes_avail
    created = last.cumulative_created_bytes - first.cumulative_created_bytes
    timing = Analysis.model_validate_json(served.run.read("analysis.json")).facts.timing
    assert created > timing.tokens / REPLAYS * 4 * WIDTH * 2  # bfloat16 of four sites: all activations went through it
    assert created > 2 * capacity
    assert last.spilled_bytes_total == first.spilled_bytes_total
    assert max(sample.object_store_bytes_fallback for sample in served.store.samples) == 0


def test_wall_time_is_split_into_parts_that_add_up(served):
    """That of the last start."""
    analysis = Analysis.model_validate_json(served.run.read("analysis.json"))
    timing = analysis.facts.timing
    assert timing is not None
    assert sum(timing.trainer_seconds.values()) == pytest.approx(timing.wall_seconds, rel=1e-6)
    assert timing.trainers == 2
    assert all(timing.trainer_seconds[part] > 0 for part in PARTS)
    config = served.run.config()
    since = [event["step"] for event in analysis.model_dump()["facts"]["events"] if event["kind"] == "resume"][-1]
    left = (config.total_steps - since) * config.optimizer.batch_tokens
    assert left < timing.tokens < left + 2 * config.transcoder.calibration_tokens
    assert timing.wall_seconds < analysis.facts.seconds["train"]
    parts = timing.forward_seconds + timing.sending_seconds + timing.idle_seconds
    assert 0.5 * timing.actor_seconds < parts <= timing.actor_seconds * 1.001
    assert timing.mfu is not None and timing.forward_mfu is not None
    assert 0 < timing.mfu < timing.forward_mfu
    assert timing.mfu == pytest.approx(timing.forward_mfu * timing.forward_seconds / timing.actor_seconds)
    report = served.run.read("report/layer1_analysis_report.md").decode()
    for words in ("What waited on what", "waiting for activations", "train step", "all-reduce", "model forward", "MFU"):
        assert words in report


def test_recomputation_from_the_run_directory_agrees(served, capsys):
    run = served.run
    code, said = recompute.main([run.url]), capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "fvu[64]" in said.out


def check_encode(base, run):
    """The service's answer is that of an offline forward pass."""
    text = "We the people of the United States"
    config, transcoder = run.config(), load_transcoder(run)
    body = {"inputs": text, "top_k": 4, "layer": config.model.layer}
    answer = httpx.post(f"{base}/encode", json=body, timeout=60).json()
    tokenizer = load_tokenizer(config.model)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    (pair,) = LanguageModel(config.model).capture(pack_windows([np.array(ids, np.int32)], []))
    with torch.no_grad():
        activations = transcoder.encode(pair.source)
    (result,) = answer["results"]
    assert result["token_ids"] == ids
    assert result["is_special"][0]
    for features, row in zip(result["features"][1:], activations[1:], strict=True):
        values = [v for v in row.topk(4).values.tolist() if v > 0]
        assert [f["activation_value"] for f in features] == pytest.approx(values, rel=1e-4)
        assert row[[f["feature_index"] for f in features]].tolist() == pytest.approx(values, rel=1e-4)


def test_encode_equals_an_offline_forward(served):
    check_encode(served.base, served.run)


def test_report_over_http(served):
    base, run, *_ = served
    asked = {"params": {"layer": 1}, "timeout": 30}
    markdown = httpx.get(f"{base}/report", **asked)
    assert markdown.status_code == 200
    assert markdown.content == run.read("report/layer1_analysis_report.md")
    browser = httpx.get(f"{base}/report", headers={"Accept": "text/html,*/*;q=0.8"}, **asked)
    assert without_links(browser.content) == run.read("report/layer1_analysis_report.html")
    as_json = httpx.get(f"{base}/report", headers={"Accept": "application/json"}, **asked).json()
    assert as_json["evaluation"]["fvu"] == json.loads(run.read("analysis.json"))["evaluation"]["fvu"]
    picture = httpx.get(f"{base}/report/files/layer1_analysis_overview.png", **asked)
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == run.read("report/layer1_analysis_overview.png")


def test_what_dashboards_ask_for_is_there(served, scraped):
    """A real Prometheus scraped the job, Ray's agents and the service: every diagram has lines to draw."""
    if scraped is None:
        pytest.skip("Debian's prometheus is not installed")
    base, run, *_ = served
    assert httpx.post(f"{base}/encode", json={"inputs": []}, timeout=30).status_code == 400
    rates = "sum by (code) (service:mtc_encode_requests:rate5m)"  # as the rules record them, which take their time
    deadline = time.monotonic() + 60
    while not any(s["metric"] == {"code": "400"} for s in prometheus.series(scraped, rates, time.time(), time.time())):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    end = time.time() + 1
    start = end - 900
    for name, job in {"up": "mtc-job", "mtc_encode_tokens_total": "mtc-service"}.items():
        assert prometheus.series(scraped, f'{name}{{job="{job}"}}', start, end)
    boards = [json.loads(path.read_text()) for path in sorted((ROOT / "k8s" / "monitoring").glob("dashboard-*.json"))]
    for panel in (panel for board in boards for panel in board["panels"]):
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "30s").replace("$run_id", RUN_ID)
            if any(instrument.name.removesuffix("_total") in expression for instrument in CIRCUITS):
                continue  # this service has no interventions; test_circuits_deployed.py has them
            if re.search(r"\b(kuberay_|DCGM_|ray_node_g|ray_cluster_(pending|failed))", expression):
                continue  # neither Kubernetes nor a real GPU is here, and no node is asked for or fails
            assert prometheus.series(scraped, expression, start, end), (panel["title"], expression)
    # And they are the run's: what the job did, from where it continued, and what it did again.
    (tokens,) = prometheus.series(scraped, f'mtc_train_tokens_total{{run_id="{RUN_ID}"}}', start, end)
    row = json.loads(run.read("metrics.jsonl").decode().splitlines()[-1])
    events = [json.loads(line) for line in run.read("events.jsonl").decode().splitlines()]
    batch, again = run.config().optimizer.batch_tokens, sum(event.get("undone", 0) for event in events)
    least = row["tokens"] - batch * events[0]["step"]
    near = 10 * batch * len(events)  # trainers say so every tenth step; what a killed one had not yet said is not there
    assert least - near <= float(tokens["values"][-1][1]) <= least + batch * again + near
    for prefix, fvu in zip(run.config().transcoder.prefixes, row["fvu"], strict=True):
        (line,) = prometheus.series(
            scraped, f'mtc_fvu_ratio{{run_id="{RUN_ID}", prefix="{prefix}",layer="1"}}', start, end
        )
        assert float(line["values"][-1][1]) == pytest.approx(fvu)
    # Each process says its own part through Ray's agent: two trainers, and for a while those before them.
    trainers = prometheus.series(scraped, f'ray_mtc_trainer_tokens_total{{run_id="{RUN_ID}"}}', start, end)
    said = [float(trainer["values"][-1][1]) for trainer in trainers]
    assert 2 <= len(said) <= 4 and 0 < max(said) <= row["tokens"], said


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
    assert done.returncode == 1
    assert "network" in done.stderr
    assert "google/gemma-2-2b" in done.stderr
    assert "Ray" not in done.stderr, "nothing was started"


def test_the_service_encodes_on_the_gpu_that_it_was_given(head, served):
    base, run, *_ = served
    command = [sys.executable, "-m", "serve.app", "--run", run.url, "--address", head["address"]]
    command += ["--port", base.rpartition(":")[2], "--set", "num_gpus=1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check_encode(base, run)
    assert gpus_in_use(head) == 1


def gpus_in_use(head):
    from ray._private.internal_api import get_state_from_address

    state = get_state_from_address(head["address"])
    return state.cluster_resources()["GPU"] - state.available_resources().get("GPU", 0)


def wait_for_another_start(run, alive, seconds=300.0):
    """Until trainers that were started after this call have completed a checkpoint."""

    def newest():
        found = [path.parent.name.split("-") for path in run.glob("checkpoints/step-*/checkpoint.json")]
        return max(((int(words[1]), words[2]) for words in found), default=(0, ""))[1]

    before, deadline = newest(), time.monotonic() + seconds
    while newest() == before:
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def addresses_of_the_dashboard(session: int) -> set[str]:
    """What the dashboard's pages are served on."""
    (pid, line), *_ = [item for item in processes_of_session(session).items() if "dashboard/dashboard.py" in item[1]]
    port = int(re.search(r"--port=(\d+)", line)[1])
    sockets = psutil.Process(pid).net_connections("tcp")
    ports = range(port, port + 50)  # where another Ray has the first one, the next that is free
    return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.port in ports}


def processes_of_session(session: int) -> dict[int, str]:
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
