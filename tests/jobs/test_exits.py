"""How jobs end: the exit code, and the last line that says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
import ray.exceptions
import ray.train
import safetensors.torch
import torch
from ray import cloudpickle as pickle
from ray.exceptions import RayTaskError
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.factory import create_failure_policy
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

import cluster.pipeline
import cluster.room
import cluster.training
from cluster.outcome import TrainingStopped
from cluster.room import own_placement_groups
from cluster.stream import TellFailures
from jobs import analyze, export, status, train
from mtc.config import ModelConfig, RunConfig, load_preset, to_yaml
from mtc.devices import DeviceError
from mtc.errors import MtcError, known_cause, one_line
from mtc.language_model import ModelError, prepare_model
from mtc.language_model.architectures import ModelUnreachableError
from mtc.storage import (
    NotVisibleError,
    RunDirectory,
    RunError,
    describe,
    load_analysis,
    open_layer_run,
    open_run,
    run_status,
)
from mtc.text import DataError, TokenStore
from mtc.text.token_store import StoreMissingError
from serve.service.catalogue import Catalogue

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [{}, {"transcoder.k": 4, "transcoder.group_sizes": [8, 16]}, {"optimizer.max_skipped_steps": 11}]
TINY = ("--preset", "tiny", "--cluster.num_model_actors", "1", "--cluster.num_trainers", "1")


def wait_for_cpus(groups: dict[str, Any]) -> None:
    """Until there are no other placement groups than these: the next job needs the CPUs."""
    deadline = time.monotonic() + 120
    while own_placement_groups() != groups:
        assert time.monotonic() < deadline
        time.sleep(0.1)


ACTOR_DIED = ray.exceptions.RayActorError(error_msg="The actor died: its node ran out of memory.")
RANK_DIED = WorkerGroupError(
    "[Rank 1 Error Snippet]:\nTraceback (most recent call last):\n  ...\nFloatingPointError: no finite gradient", {}
)


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize(
    ("error", "reason"),
    [(ACTOR_DIED, "its node ran out of memory."), (RANK_DIED, "FloatingPointError: no finite gradient")],
)
def test_trainers_that_die_for_good(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    reason: str,
) -> None:
    def fit() -> None:
        raise error

    def run_pipeline(config: RunConfig) -> None:
        nothing: Any = SimpleNamespace(digest=lambda store: "digest", event=SimpleNamespace(remote=lambda *event: None))
        run = RunDirectory(f"{config.output.root}/run")
        cluster.training.train(config, nothing, run, "store", 32, nothing, lambda: None, nothing)

    starts = list[tuple[Any, ...]]()
    monkeypatch.setattr(
        cluster.training, "_trainer", lambda *arguments: starts.append(arguments) or SimpleNamespace(fit=fit)
    )
    for module in (cluster.training, cluster.room):
        monkeypatch.setattr(module, "own_placement_groups", dict)
    monkeypatch.setattr(TokenStore, "open", lambda url: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cluster.pipeline, "check", lambda config: config)
    monkeypatch.setattr(cluster.pipeline, "connected", lambda verbose: nullcontext())
    monkeypatch.setattr(cluster.pipeline, "run_pipeline", run_pipeline)
    monkeypatch.setattr(train.signal, "signal", lambda *handler: None)
    code = train.main([*TINY, "--output.root", str(tmp_path), "--log-format", "json"])
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (code, lines[-1]["event"], lines[-1]["level"]) == (1, "failed", "error")
    assert lines[-1]["message"].startswith("failed: cluster.max_failures=3: ")
    assert lines[-1]["message"].endswith(reason)
    assert "Traceback" in lines[-2]["message"], "all of it, for whoever looks"
    assert len({arguments[-1] for arguments in starts}) == len(starts), "no name that another user could have taken"


@pytest.mark.usefixtures("logs_as_before")
def test_what_no_one_has_foreseen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise PermissionError("Access Denied:\n the bucket's policy")

    monkeypatch.setattr(train.signal, "signal", lambda *handler: None)
    for job, place, entry, options in (
        (train, cluster.pipeline, "check", ["--preset", "tiny"]),
        (analyze, analyze, "open_run", ["--run", "runs/latest"]),
        (export, export, "open_run", ["--run", "runs/latest", "--format", "saelens", "--output", "exported"]),
        (status, status, "run_status", ["runs/latest"]),
    ):
        monkeypatch.setattr(place, entry, fail)
        assert job.main(options) == 1
        err = capsys.readouterr().err.splitlines()
        assert err[-1] == "failed: PermissionError: the bucket's policy"
        assert any("Traceback" in line for line in err[:-1])


@pytest.mark.usefixtures("logs_as_before")
def test_a_wrong_option_is_told_in_the_format_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main(["--run", "nowhere", "--analysis.num_tokens", "5", "--log-format", "json"]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["event"] == "error"
    assert train.main([*TINY, "--transcoder.k", "1000", "--log-format", "json"]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["message"].startswith("error: transcoder.k=1000")


@pytest.mark.usefixtures("logs_as_before", "ray_cluster")
def test_a_run_that_another_job_takes_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first job stops; a third one, a sweep of the tiny preset on CPUs, brings the run to its end, both beside an
    actor that holds 0.5 of 2 CPUs, as a replica of the service does: the plan of an empty machine would wait for ever.
    """
    replica = ray.remote(SimpleNamespace).options(num_cpus=0.5).remote()
    run, over = RunDirectory(str(tmp_path / "run")), threading.Event()
    groups = own_placement_groups()
    start, logs = cluster.pipeline.start_metrics_log, list[Any]()

    def start_log(run: RunDirectory) -> Any:
        logs.append(start(run))  # as a traceback keeps it that a notebook shows
        return logs[-1]

    def take() -> None:
        while not run.exists("writer.json"):
            if over.wait(0.05):
                return
        run.write("writer.json", json.dumps({"id": "x", "host": "elsewhere", "pid": 7, "beat": 1}))

    other = threading.Thread(target=take)
    other.start()
    monkeypatch.setattr(cluster.pipeline, "start_metrics_log", start_log)
    monkeypatch.setattr(train.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(cluster.pipeline, "connected", lambda verbose: nullcontext())
    try:
        options = ["--output.root", str(tmp_path), "--output.run_id", "run", "--log-format", "json"]
        options += ["--optimizer.backend", "sparse", "--sweep", json.dumps(SWEEP)]
        code = train.main([*TINY, *options])
    finally:
        over.set()
        other.join()
    wait_for_cpus(groups)
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (code, last["event"]) == (2, "error")
    assert last["message"].endswith("run_id=run: another job writes this run now, process 7 on elsewhere")
    assert run.exists("writer.json"), "it is the other's now"
    assert not run.is_finished()
    run.remove("writer.json")
    assert train.main([*TINY, *options]) == 0
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if line.startswith("{")]  # some are Ray's
    assert "finished" in [json.loads(line)["event"] for line in lines]
    ray.kill(replica)
    finished = open_run(str(tmp_path / "latest"))
    assert finished.url == run.url and finished.run_id == "run"
    names = ["base", "k4-groups8x16", "max-skipped-steps11"]
    assert list(finished.members()) == names
    report = json.loads(finished.read("report/sweep_report.json"))
    (compared,) = (json.loads(line) for line in lines if json.loads(line)["event"] == "compared")
    assert compared["taken"] == report["taken"] and report["taken"]["1"] in compared["message"]
    assert f"{finished.url}/report/sweep_report.html" in compared["message"]
    assert "  base: held-out fvu" in describe(run_status(run.url))
    steps = [json.loads(line) for line in lines if json.loads(line)["event"] == "step"]
    weights, lines_of = [], []
    for name, listed in zip(names, report["members"], strict=True):
        own = open_layer_run(f"{tmp_path}/latest/{name}")
        analysis, config = load_analysis(own), own.config()
        assert own.run_id == analysis.facts.run_id == f"run/{name}" == f"run/{listed['member']}"
        assert analysis.facts.other_members == tuple(other for other in names if other != name)
        assert config == analysis.config and config.sweep is None
        assert analysis.facts.devices == ("cpu",)
        assert analysis.evaluation.fvu[-1] < 0.9, "nothing was learnt"
        assert analysis.evaluation.l0[-1] == pytest.approx(config.transcoder.k, rel=0.2)
        assert listed["summary"]["fvu"] == list(analysis.summary.fvu)
        lines_of.append(analysis.evaluation.line)
        assert own.read("report/layer1_analysis_report.html").startswith(b"<!doctype html>")
        history = own.read_lines("metrics.jsonl")
        assert history[-1]["step"] == config.total_steps and {row["member"] for row in history} == {name}
        assert steps[-1]["members"][name]["fvu"] == history[-1]["fvu"]
        weights.append(safetensors.torch.load(own.read("transcoder.safetensors")))
    assert lines_of[0] is not None and lines_of[0].fvu == lines_of[1].fvu, "one sum serves all of a layer"
    assert lines_of[0].added != lines_of[1].added
    # A limit that nothing reached changes nothing: the same batches give the same bits, whoever else is trained.
    for name, value in weights[0].items():
        assert torch.equal(weights[2][name], value), name
    assert weights[1]["W_enc"].shape != weights[0]["W_enc"].shape
    with pytest.raises(RunError, match=r"holds 3 transcoders; name one of them: .*/run/base, .*/run/k4-groups8x16, "):
        Catalogue(run.url).served()
    served = Catalogue(f"{run.url}/base")
    assert [entry.key.run_id for entry in served.entries()] == [f"run/{name}" for name in reversed(names)]
    assert Catalogue(f"{tmp_path}/latest/base").root == served.root == str(tmp_path)
    assert served.find("run/k4-groups8x16").config.transcoder.group_sizes == (8, 16)


@pytest.mark.usefixtures("logs_as_before")
def test_a_finished_run_whose_model_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write("config.yaml", to_yaml(load_preset("tiny", {"model": {"name": str(tmp_path / "gone")}})))
    run.write("transcoder.safetensors", b"")
    run.publish()
    monkeypatch.setattr(cluster.pipeline, "connected", None)  # no cluster is started
    assert analyze.main(["--run", run.url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: model.name={tmp_path / 'gone'} is neither a directory here nor a hub id: ")


@pytest.mark.usefixtures("logs_as_before", "ray_cluster")
def test_a_model_that_changes_after_the_check_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are cut short when the text is tokenised; what a model actor then finds is said in one line."""
    shutil.copytree(prepare_model(ModelConfig(name="random:llama", layer=1)), tmp_path / "model")
    groups, starts = own_placement_groups(), list[str]()
    trainer = cluster.training._trainer

    def damage_and_train(*arguments: Any) -> Any:
        starts.append("start")
        os.truncate(tmp_path / "model/model.safetensors", 60_000)
        return trainer(*arguments)

    monkeypatch.setattr(cluster.training, "_trainer", damage_and_train)
    monkeypatch.setattr(train.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(cluster.pipeline, "connected", lambda verbose: nullcontext())
    options = ["--model.name", str(tmp_path / "model"), "--output.root", str(tmp_path), "--output.run_id", "run"]
    code = train.main([*TINY, *options, "--log-format", "json"])
    wait_for_cpus(groups)
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.err.splitlines()]
    assert (code, lines[-1]["event"]) == (2, "error")
    assert re.search(
        r"model\.safetensors is cut short or damaged, 60,000 bytes of \d\d\d?,\d{3}: ", lines[-1]["message"]
    )
    assert "Traceback" not in said.err + said.out
    events = [json.loads(line) for line in RunDirectory(str(tmp_path / "run")).read("events.jsonl").splitlines()]
    assert [event["kind"] for event in events] == ["failure"], "one start"
    assert starts == ["start"]
    assert "cut short" in events[0]["message"]


@pytest.mark.usefixtures("logs_as_before")
def test_data_that_a_task_refuses(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise DataError("data.name='x' has no text")

    monkeypatch.setattr(cluster.pipeline, "check", lambda config: ray.get(ray.remote(refuse).remote()))
    monkeypatch.setattr(train.signal, "signal", lambda *handler: None)
    assert train.main(["--preset", "tiny"]) == 2
    assert capsys.readouterr().err == "error: data.name='x' has no text\n"


def in_a_task(error: Exception) -> Exception:
    """What Ray raises for an error of a task."""
    return RayTaskError("map", "Traceback ...", error, "ray::map", 1, "127.0.0.1").as_instanceof_cause()


GONE = ModelError("m holds no weights")
PERMANENT = [
    GONE,
    in_a_task(GONE),
    in_a_task(in_a_task(in_a_task(DataError("data.name='x' has no text")))),  # actor, split coordinator, trainer
    in_a_task(TrainingStopped("data.max_skipped_share=0.05")),
]
MAY_PASS = [
    ACTOR_DIED,
    in_a_task(ACTOR_DIED),
    in_a_task(ModelUnreachableError("m can't be loaded: Stale file handle")),
    in_a_task(RunError("runs/1/checkpoints/step-1 has no file 'units_0.json'")),
    in_a_task(DeviceError("this process was given a GPU, but torch sees none")),
    in_a_task(NotVisibleError("checkpoint step-1 is not visible here")),
    in_a_task(StoreMissingError("no token store at nfs/tokens/1")),
    in_a_task(OSError(5, "Input/output error")),
    FloatingPointError("no finite gradient"),
]


@pytest.mark.parametrize("error", [*PERMANENT, *MAY_PASS])
def test_trainers_are_started_again_unless_that_is_useless(error: Exception) -> None:
    """What Ray Train's controller does with what a trainer raised; the other one died with it."""
    told = list[Any]()
    callback = TellFailures(SimpleNamespace(event=SimpleNamespace(remote=lambda *event: told.append(event))))
    handler = UserCallbackHandler([callback], None)  # type: ignore[arg-type]
    errors = {0: RuntimeError("Connection closed by peer"), 1: pickle.loads(pickle.dumps(error))}
    status = WorkerGroupPollStatus({rank: WorkerStatus(running=False, error=each) for rank, each in errors.items()})
    decided = None
    try:
        handler.after_worker_group_poll_status(status)
    except Exception as raised:  # as the controller takes it
        policy = create_failure_policy(ray.train.FailureConfig(max_failures=3))
        decided = policy.make_decision(failure := ControllerError(raised))
        assert known_cause(pickle.loads(pickle.dumps(failure))).args == known_cause(error).args  # type: ignore[union-attr]
    assert decided is (FailureDecision.RAISE if error in PERMANENT else None)
    assert [event[0] for event in told] == ["failure", "failure"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_ray_data_adds_to_an_error_is_left_out() -> None:
    def refuse(batch: Any) -> Any:  # it yields, as all tasks of ours do
        yield batch
        raise DataError("data.name='x' has no text")

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    with pytest.raises(DataError, match="To change retry attempts") as caught:
        ray.data.from_items([1]).map_batches(refuse, num_cpus=0.1).materialize()
    assert repr(known_cause(caught.value)) == repr(DataError("data.name='x' has no text"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Traceback:\n  File x\nValueError: no\n", "RuntimeError: ValueError: no"),
        ("torch: RuntimeError: Connection closed by peer\n\nAt:\n  /a/distributed.py(130): <lambda>\n",
         "RuntimeError: torch: RuntimeError: Connection closed by peer"),
        ("Connection closed by peer\n\nAt:\n  /a/b.py(1): f\n\n[Rank 1]:\nthe node is low on memory\nMemory: 1 GB",
         "RuntimeError: the node is low on memory"),
        ("\nthe node is low on memory\nMemory: 1 GB\n", "RuntimeError: the node is low on memory"),
    ],
)  # fmt: skip
def test_of_long_errors_the_line_that_says_why_is_shown(said: str, reason: str) -> None:
    assert one_line(RuntimeError(said)) == reason


def test_every_error_of_ours_ends_a_job_with_a_documented_code() -> None:
    reliability = (ROOT / "docs" / "reliability.md").read_text()
    kinds: list[type[MtcError]] = [MtcError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        assert f"| {kind.exit_code} | " in reliability
