"""jobs/check.py: all that is wrong with a run at once, its plan and its memory, without Ray."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

import cluster.checks
import cluster.pipeline
from cluster.memory import memory_plan
from cluster.memory_training import stream_bytes
from cluster.resources import Node, make_plan
from jobs import check
from mtc.config import load_preset
from mtc.language_model import check_model
from mtc.text.sources import DataUnreachableError

pytestmark = pytest.mark.usefixtures("logs_as_before")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def found(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code = check.main(["--preset", "tiny", "--json", *options])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (2 if said["problems"] else 0)
    return said


def nodes(tmp_path: Path, *entries: str) -> tuple[str, str]:
    path = tmp_path / "nodes.yaml"
    path.write_text("nodes:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    return "--nodes", str(path)


def test_a_run_without_a_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check.main(["--preset", "tiny"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan for 1 node with ") and "memory of the fullest node" in out
    assert out.splitlines()[-1] == "no problem found"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_all_problems_are_told_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = ("--output.root", "file/runs", "--model.name", "./nowhere", "--data.name", "texts/")
    options += ("--analysis.probe_tasks", '["nothing"]', "--cluster.use_gpu", "true")
    said = found(capsys, *options, *nodes(tmp_path, "cpus: 4"))
    starts = ("output.root=file/runs: ", "model.name=", "data.name=", "probing task 'nothing'", "cluster.use_gpu is")
    for start in starts:
        assert [text for text in said["problems"] if text.startswith(start)], (start, said)
    assert len(said["problems"]) == len(starts) and said["plan"] is None
    assert check.main(["--preset", "tiny", *options]) == 2
    assert sum(line.startswith("problem: ") for line in capsys.readouterr().out.splitlines()) >= len(starts) - 1


def test_the_plan_is_that_of_the_listed_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = nodes(tmp_path, "cpus: 2, head: true", "cpus: 16, gpus: 4, gpu_memory: 80 GB, count: 3")
    said = found(capsys, *listed, "--cluster.num_trainers", "2")
    assert said["problems"] == []
    head, titles, trainers, *_ = said["plan"].splitlines()
    assert head == "plan for 3 nodes with 48 CPUs and 12 GPUs, on cuda", "the head runs nothing"
    assert dict(zip(titles.split()[-1:], trainers.split()[-3:], strict=False)) and "one per node" in trainers
    assert [text.partition(":")[0] for text in said["not_checked"]] == [
        "main memory", "whether torch sees the GPUs", "output.root=runs"
    ]  # fmt: skip


def test_memory_is_held_against_the_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Just enough and just too little, by what the plan counts."""
    wide = ("--transcoder.group_sizes", "[100000, 100000]", "--cluster.num_trainers", "1")
    overrides = {"transcoder": {"group_sizes": [100000, 100000]}, "cluster": {"num_trainers": 1}}
    config = load_preset("tiny", overrides)
    plan = make_plan(config, [Node(4, 0, memory=1e15)])
    info = check_model(config.model, config.data.context_length)
    stages = memory_plan(config, plan, info).stages
    main = max(sum(each.bytes for each in stage.main()) for stage in stages) + stream_bytes(config, info)
    (few,) = found(capsys, *wide, *nodes(tmp_path, f"cpus: 4, memory: {int(0.99 * main)}"))["problems"]
    assert "of main memory" in few and "transcoder.group_sizes" in few
    assert found(capsys, *wide, *nodes(tmp_path, f"cpus: 4, memory: {int(1.01 * main)}"))["problems"] == []
    (gpu,) = found(capsys, *wide, *nodes(tmp_path, "cpus: 4, memory: 1 TB, gpus: 2, gpu_memory: 100 MB"))["problems"]
    assert "a GPU has 0.1 GB" in gpu
    fits = found(capsys, *wide, *nodes(tmp_path, "cpus: 4, memory: 1 TB, gpus: 2, gpu_memory: 80 GB"))
    assert fits["problems"] == [] and "trainer" in fits["memory"]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["cpus: 0"], "nodes.0.cpus: more than 0.0 is wanted, got '0'"),
        (["cpus: 4, memry: 1 GB"], "nodes.0.memry: there is no such field"),
        (["cpus: 4, memory: much"], "nodes.0.memory: "),
        (["cpus: 4, head: true", "cpus: 4, head: true"], "a cluster has one head, here 2 nodes are"),
        ([], "nodes: a list is wanted"),
    ],
)
def test_a_wrong_list_of_nodes(
    entries: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name, path = nodes(tmp_path, *entries)
    assert check.main(["--preset", "tiny", name, path]) == 2
    assert f"error: {name} {path}: {said}" in capsys.readouterr().err


def test_what_may_be_otherwise_next_time_is_not_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(config: object) -> None:
        raise DataUnreachableError("the hub cannot be reached")

    monkeypatch.setattr(cluster.checks, "check_data", unreachable)
    said = found(capsys)
    assert (said["problems"], said["not_checked"]) == ([], ["the hub cannot be reached"])


def test_a_run_that_was_finished(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/manifest.json").write_text("{}")
    (problem,) = found(capsys, "--output.run_id", "first")["problems"]
    assert problem.startswith("output.run_id=first is a finished run")


@pytest.mark.usefixtures("ray_cluster")
def test_the_cluster_of_the_address_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.pipeline, "connected", lambda verbose: nullcontext())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    cpus = sum(node["Resources"].get("CPU", 0) for node in ray.nodes())
    assert found(capsys)["plan"].startswith(f"plan for {len(ray.nodes())} node with {cpus:g} CPUs and 0 GPUs, on cpu")
