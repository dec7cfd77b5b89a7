"""Troubles that are not a process's death: a full disk, too little memory, a slow actor, bad numbers, SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults import Job, ray_head, wait_for
from mtc.config import load_preset
from mtc.language_model import load_tokenizer, prepare_model
from mtc.storage import open_run
from tests.chaos.runs import OPTIONS, none_too_often

pytestmark = pytest.mark.chaos

OPTIONS = [*OPTIONS, "--data.unit_tokens", "1024"]


def finished(job, each="each once"):
    job.finish()
    run = open_run(str(job.run))
    assert each in job.output()
    return run, none_too_often(run.url)


@pytest.fixture(scope="module")
def head():
    with ray_head() as head:
        yield head


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_loses_nothing_and_is_reported(head, small_disk):
    job = Job(head, small_disk, "full", [*OPTIONS, "--data.num_tokens", "1500000", "--cluster.storage_seconds", "3"])
    job.wait_for_checkpoint(0)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096 if _room(small_disk) else b"") > 0:
            pass
    wait_for("the report", lambda: "checkpoint failed" in job.output(), 60)
    assert "No space left on device" in job.output()
    assert job.newest() > 0, "the checkpoint before must stay"
    assert job.running
    filler.unlink()
    job.wait_for_checkpoint(job.newest())
    run, _ = finished(job)
    events = [json.loads(line) for line in run.read("events.jsonl").decode().splitlines()]
    assert any(event["kind"] == "checkpoint_failed" for event in events)
    assert not any(event["kind"] == "failure" for event in events), "training must go on"


def _room(disk: Path) -> int:
    return os.statvfs(disk).f_bavail


def test_a_slow_model_actor_delays_and_nothing_else(head, tmp_path):
    job = Job(head, tmp_path, "slow", [*OPTIONS, "--data.num_tokens", "600000"])
    job.wait_for_checkpoint(0)
    victim = wait_for("an actor", lambda: head.processes("model actor"))[0]
    victim.send_signal(signal.SIGSTOP)
    time.sleep(8)
    victim.send_signal(signal.SIGCONT)
    run, _ = finished(job)
    assert not [event for event in job.events() if event["kind"] == "failure"]
    del run


def test_sigterm_leaves_a_run_that_continues(head, tmp_path):
    job = Job(head, tmp_path, "term", [*OPTIONS, "--data.num_tokens", "600000"])
    job.wait_for_checkpoint(0)
    job.process.terminate()
    assert job.process.wait(60) == 130
    assert "the same output.run_id continues the run" in job.output()
    newest = job.newest()
    job.start()
    finished(job)
    assert f"continues from the checkpoint of step {newest:,}" in job.output()


def test_a_controller_that_dies_with_its_helper_leaves_its_cpus_to_the_next(head, tmp_path):
    """Ray's memory monitor kills several at once, and a node takes all that it holds."""
    job = Job(head, tmp_path, "both", [*OPTIONS, "--data.num_tokens", "600000"])
    job.wait_for_checkpoint(0)
    start = job.trainers_start()
    head.kill("placement group cleaner")
    head.kill("train controller")
    job.wait_for_restart(start)
    finished(job)


def test_an_actor_or_the_driver_that_dies_in_the_analysis_costs_time_only(head, tmp_path):
    options = [*OPTIONS, "--data.num_tokens", "50000"]
    first = Job(head, tmp_path, "actor", options)
    head.kill("analysis actor")
    run, _ = finished(first)
    second = Job(head, tmp_path, "driver", options)
    wait_for("the analysis", lambda: head.processes("analysis actor"))
    second.kill()
    assert not (second.run / "manifest.json").exists()
    wait_for("the end of its actors", lambda: not head.processes("analysis actor"))
    second.start()
    again, _ = finished(second)
    assert not [event for event in second.events() if event["kind"] == "resume"], "training is not done again"
    mine, its = (json.loads(r.read("analysis.json"))["evaluation"] for r in (run, again))
    assert mine == its
    assert run.read("examples.parquet") == again.read("examples.parquet")


def test_another_number_of_trainers_continues_a_run(head, tmp_path):
    """And the global batch stays the same; with tokens that are left one, two or three times."""
    options = [*OPTIONS, "--data.num_tokens", "200000", "--data.replays", "3"]
    job = Job(head, tmp_path, "many", [*options, "--cluster.num_trainers", "2"])
    job.wait_for_checkpoint(20)
    job.kill()
    start = job.trainers_start()
    job.command = [*job.command[:-1], "1"]
    job.start()
    job.wait_for_restart(start)
    job.kill()
    start = job.trainers_start()
    job.command = [*job.command[:-1], "3"]
    job.start()
    job.wait_for_restart(start)
    run, progress = finished(job, " 3 times\n")
    assert progress.trained_tokens() == 3 * progress.captured_tokens()
    history = [json.loads(line) for line in run.read("metrics.jsonl").decode().splitlines()]
    assert [row["tokens"] for row in history[:-1]] == [256 * row["step"] for row in history[:-1]]
    assert progress.trained_tokens() == history[-1]["tokens"]
    starts = [event["message"] for event in job.events() if event["kind"] == "resume"]
    assert [message.split(" after")[0] for message in starts] == ["on 1 trainer", "on 3 trainers"]


def test_a_second_job_of_the_same_run_is_refused(head, tmp_path):
    job = Job(head, tmp_path, "one", [*OPTIONS, "--data.num_tokens", "1500000"])
    job.wait_for_checkpoint(0)
    second = Job(head, tmp_path, "one", [*OPTIONS, "--data.num_tokens", "1500000"])
    assert second.process.wait(120) == 2
    assert "output.run_id=one: another job of this cluster is training it" in second.output()
    finished(job)


@pytest.fixture
def bad_model(tmp_path):
    """The tiny model, whose embedding of one character is not a number."""

    def make(character: str) -> str:
        (byte,) = load_tokenizer(load_preset("tiny").model).encode(character, add_special_tokens=False)
        directory = Path(prepare_model(load_preset("tiny").model))
        copy = tmp_path / "model"
        copy.mkdir()
        for path in directory.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        weights = load_file(copy / "model.safetensors")
        weights["model.embed_tokens.weight"][byte] = torch.nan
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        return str(copy)

    return make


def test_activations_that_are_not_finite_are_dropped_counted_and_shown(head, tmp_path, bad_model):
    rare = bad_model("Z")
    job = Job(head, tmp_path, "some", [*OPTIONS, "--data.num_tokens", "100000", "--model.name", rare])
    run, progress = finished(job)
    dropped = progress.dropped_tokens()
    assert 0 < dropped < 0.05 * 100_000
    facts = json.loads(run.read("analysis.json"))["facts"]
    assert facts["dropped_tokens"] == dropped
    assert f"{dropped:,}" in run.read("report/layer1_analysis_report.md").decode()
    assert progress.trained_tokens() == facts["trained_tokens"]


def test_too_many_of_them_stop_the_run_with_that_reason(head, tmp_path, bad_model):
    job = Job(head, tmp_path, "all", [*OPTIONS, "--data.num_tokens", "100000", "--model.name", bad_model("e")])
    assert job.process.wait(240) == 2
    assert "data.max_skipped_share=0.05" in job.output()
    assert "not finite" in job.output()
    assert not (job.run / "manifest.json").exists()


def test_divergence_goes_back_and_then_ends_with_the_reason(head, tmp_path):
    options = ["--optimizer.lr", "1e30", "--optimizer.warmup_steps", "0", "--cluster.max_failures", "1"]
    job = Job(head, tmp_path, "far", [*OPTIONS, "--data.num_tokens", "100000", *options])
    assert job.process.wait(300) == 1
    assert "had no finite gradient" in job.output()
    assert "lower optimizer.lr" in job.output()


def test_workers_killed_for_memory_cost_time_only(tmp_path):
    """Ray's monitor kills workers while another program takes the node's memory."""
    total, used = psutil.virtual_memory().total, psutil.virtual_memory().total - psutil.virtual_memory().available
    limit = used + 6e9
    environment = {"RAY_memory_usage_threshold": f"{limit / total:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    hog = """
import sys, time
block = bytearray(int(float(sys.argv[1])))
for at in range(0, len(block), 4096):
    block[at] = 1
print("full", flush=True)
time.sleep(60)
"""
    with ray_head(environment=environment) as head:
        job = Job(head, tmp_path, "oom", [*OPTIONS, "--data.num_tokens", "1500000", "--cluster.max_failures", "20"])
        job.wait_for_checkpoint(0)
        before = {p.pid for kind in ("model actor", "trainer", "split coordinator") for p in head.processes(kind)}
        free = psutil.virtual_memory().available - (total - limit)
        process = subprocess.Popen([sys.executable, "-c", hog, str(free + 0.5e9)], stdout=subprocess.PIPE)
        try:
            wait_for("a kill", lambda: any(not psutil.pid_exists(pid) for pid in before), 60)
            moment = time.monotonic()
        finally:
            process.kill()
            process.wait()
        job.wait_for_checkpoint(job.newest())
        print(f"out of memory: {time.monotonic() - moment:.0f} s until the next checkpoint")
        finished(job)
        failures = [event["message"] for event in job.events() if event["kind"] in ("failure", "restart")]
        assert not failures or any("low on memory" in message for message in failures), failures
