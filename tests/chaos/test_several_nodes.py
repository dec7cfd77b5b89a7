"""A run over three nodes that share no disk but one, and what happens when one of them dies."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import ROOT, wait_for
from mtc.storage import open_run
from tests.chaos.nodes import available, real_cluster
from tests.chaos.runs import OPTIONS, none_too_often

pytestmark = pytest.mark.chaos

TOKEN = "0123456789abcdef" * 4
OPTIONS = [*OPTIONS, "--cluster.num_trainers", "2", "--cluster.num_model_actors", "2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := available():
        pytest.skip(reason)
    with real_cluster(tmp_path_factory.mktemp("cluster"), token=TOKEN) as cluster:
        yield cluster


def train(root, run_id, *options):
    command = [sys.executable, str(ROOT / "jobs/train.py"), *OPTIONS, "--output.root", str(root)]
    return [*command, "--output.run_id", run_id, *options]


def submit(cluster, job_id, root, run_id, *options):
    """With `ray job submit`, which leaves when the job is accepted."""
    line = ["ray", "job", "submit", "--no-wait", "--address", f"http://{cluster.addresses[0]}:8265"]
    done = cluster.run([*line, "--submission-id", job_id, "--", *train(root, run_id, *options)])
    assert done.returncode == 0, done.stdout + done.stderr


def job(cluster, *words):
    return cluster.run(["ray", "job", words[0], "--address", f"http://{cluster.addresses[0]}:8265", *words[1:]]).stdout


def newest(run: Path) -> int:
    return max(
        (int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/step-*/checkpoint.json")), default=0
    )


def test_a_disk_that_is_not_shared_is_refused(cluster):
    done = cluster.run(train(cluster.private / "runs", "local"), env={"RAY_ADDRESS": f"{cluster.addresses[0]}:6379"})
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2 of 3 nodes do not see what is written there" in done.stderr
    assert cluster.addresses[1] in done.stderr


def test_a_run_over_three_nodes_that_is_stopped_and_survives_the_death_of_one(cluster):
    """`ray job stop` leaves a resumable run; then a node dies, an empty one takes its place; the head does no work."""
    root = cluster.shared / "runs"
    run = root / "nodes"
    submit(cluster, "first", root, "nodes", "--data.num_tokens", "600000")
    wait_for("a checkpoint", lambda: newest(run) > 0, 240)
    workers = [
        line for pid in cluster.pids(0) for line in [Path(f"/proc/{pid}/cmdline").read_text()] if "ray::" in line
    ]
    assert not [line for line in workers if "MapWorker" in line or "RayTrainWorker" in line], workers
    job(cluster, "stop", "first")
    assert not (run / "manifest.json").exists()
    stopped_at = newest(run)

    submit(cluster, "second", root, "nodes", "--data.num_tokens", "600000")
    wait_for("progress", lambda: newest(run) > stopped_at, 240)
    cluster.kill_node(2)
    at, moment = newest(run), time.monotonic()
    cluster.start_node(2)
    wait_for("progress after the node's death", lambda: newest(run) > at, 300)
    print(f"node: {time.monotonic() - moment:.0f} s until the next checkpoint")
    wait_for("the end", lambda: (run / "manifest.json").exists(), 600)
    out = job(cluster, "logs", "second")
    assert "failure" in out, out
    assert "each once" in out
    finished = open_run(str(run))
    progress = none_too_often(str(run))
    assert progress.trained_tokens() >= 600_000 // 256 * 256
    events = [json.loads(line) for line in finished.read("events.jsonl").decode().splitlines()]
    assert sum(event["kind"] == "resume" for event in events) >= 2
    for node in (1, 2):  # once per node, whatever the number of actors
        models = cluster.root(node) / str(cluster.home / ".cache/mtc/models").lstrip("/")
        assert len([path for path in models.iterdir() if path.is_dir()]) == 1


def test_without_the_token_nothing_runs(cluster):
    done = cluster.run(train(cluster.shared / "runs", "x"), env={
        "RAY_ADDRESS": f"{cluster.addresses[0]}:6379", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": None,
    }, timeout=120)  # fmt: skip
    assert done.returncode != 0
    assert "auth" in (done.stdout + done.stderr).lower()


CLUSTER = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 150_000_000})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=150_000_000)
ray.init(address=cluster.address, log_to_driver=False)

from cluster.pipeline import run_pipeline
from jobs.command_line import parse_command_line

config, _ = parse_command_line(sys.argv[1:], "test")
run = Path(config.output.root, config.output.run_id)

def newest():
    return max((int(p.parent.name.split("-")[1]) for p in run.glob("checkpoints/step-*/checkpoint.json")), default=0)

done = threading.Event()

def work():
    run_pipeline(config)
    done.set()

threading.Thread(target=work, daemon=True).start()
while not newest():
    time.sleep(0.1)
node = sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0]
cluster.remove_node(node, allow_graceful=False)  # and none comes instead
print("node removed", flush=True)
assert done.wait(500), "the run did not end"
print("finished", flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_fewer_trainers_go_on_when_a_node_stays_away(tmp_path):
    """Three raylets; after one died for good, one trainer of two trains on, with the same global batch."""
    options = [
        *OPTIONS,
        "--cluster.min_trainers",
        "1",
        "--data.num_tokens",
        "400000",
        "--cluster.num_model_actors",
        "1",
    ]
    options += ["--output.root", str(tmp_path / "runs"), "--output.run_id", "elastic", "--cluster.stall_seconds", "60"]
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    run = open_run(str(tmp_path / "runs" / "elastic"))
    progress = none_too_often(run.url)
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    steps = run.config().total_steps
    assert history[-1]["step"] == steps
    assert [row["tokens"] for row in history[:-1]] == [256 * row["step"] for row in history[:-1]]
    assert progress.trained_tokens() == history[-1]["tokens"]
    events = [json.loads(line) for line in run.read("events.jsonl").decode().splitlines()]
    starts = [event["message"] for event in events if event["kind"] == "resume"]
    assert any(message.startswith("on 1 trainer ") for message in starts), starts
