import json
import os
import subprocess
import sys
from contextlib import ExitStack

import fsspec
import pytest

from cluster.places import run_directory
from mtc.config import load_preset, to_yaml
from mtc.storage import Lease, RunDirectory, RunError, open_run, write_atomic
from serve.service.catalogue import Catalogue


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "runs")
    else:
        yield "memory://runs"
        fsspec.filesystem("memory").store.clear()


def make(root, name):
    run = RunDirectory(f"{root}/{name}")
    run.write("config.yaml", to_yaml(load_preset("tiny")))
    run.write("report/plot.png", b"\x89PNG" + bytes(300))
    run.write("checkpoints/x/big.bin", b"not part of the run")
    return run


def test_a_root_may_end_with_a_slash(root):
    config = load_preset("tiny", {"output": {"root": f"{root}/", "run_id": "a"}})
    run = run_directory(config)
    assert run.url == f"{root}/a"
    run.write("config.yaml", to_yaml(config))
    run.publish()
    assert open_run(f"{root}/latest").url == run.url


def test_a_root_may_be_named_latest(root):
    make(f"{root}/of/latest", "a").publish()
    assert open_run(f"{root}/of/latest/a").url == f"{root}/of/latest/a"
    assert open_run(f"{root}/of/latest/latest").url == f"{root}/of/latest/a"
    assert Catalogue(f"{root}/of/latest/a").root == f"{root}/of/latest"


def test_lines_of_json(root):
    run = make(root, "a")
    assert run.read_lines("events.jsonl") == []
    run.write("events.jsonl", '{"kind": "a"}\n\n{"kind": "\u2028b\x85"}\n')
    assert run.read_lines("events.jsonl") == [{"kind": "a"}, {"kind": "\u2028b\x85"}]


def test_only_published_runs_are_found(root):
    first, second = make(root, "a"), make(root, "b")
    with pytest.raises(RunError, match="no finished run"):
        open_run(f"{root}/latest")
    with pytest.raises(RunError, match=r"no manifest\.json: the run is not finished"):
        open_run(f"{root}/a")
    with pytest.raises(RunError, match="no run at"):
        open_run(f"{root}/zzz")
    first.publish()
    assert open_run(f"{root}/latest").run_id == "a"
    manifest = second.publish()
    assert open_run(f"{root}/latest").run_id == "b"
    assert set(manifest.files) == {"config.yaml", "report/plot.png"}
    assert open_run(f"{root}/b").config() == load_preset("tiny")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(b"\x89PNG" + bytes(299) + b"x", "damaged"), (b"short", "has 5 bytes"), (None, "no file 'report/plot.png'")],
)
def test_damage_is_found(root, damage, message):
    run = make(root, "a")
    run.publish()
    if damage is None:
        run.fs.rm(f"{run.path}/report/plot.png")
    else:
        run.write("report/plot.png", damage)
    with pytest.raises(RunError, match=message):
        open_run(f"{root}/a")


def test_unknown_format_is_refused(root):
    run = make(root, "a")
    run.publish()
    raw = json.loads(run.read("manifest.json"))
    run.write("manifest.json", json.dumps(raw | {"format_version": 99}))
    with pytest.raises(RunError, match="format_version 99 is unknown"):
        open_run(f"{root}/a")


def test_a_failed_write_leaves_the_old_content_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomic(str(path), b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_one_job_writes_a_run_at_a_time(tmp_path):
    run = RunDirectory(str(tmp_path / "run"))
    fast = {"beat": 0.05, "stale": 0.6}
    with Lease(run, **fast) as first:
        with (
            pytest.raises(RunError, match=rf"another job is writing this run, process {os.getpid()} on "),
            Lease(run, **fast),
        ):
            pytest.fail("two at once")
        first.require()
        run.write("file", "content")
        assert list(run.publish().files) == ["file"]
    assert not run.exists("writer.json")
    with Lease(run, **fast):
        pass


def test_a_killed_jobs_run_is_free_and_one_that_comes_back_stops(tmp_path, monkeypatch):
    run = RunDirectory(str(tmp_path / "run"))
    code = f"""
import os, signal
from mtc.storage import Lease
from mtc.storage import RunDirectory
with Lease(RunDirectory({run.url!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert run.exists("writer.json")
    with ExitStack() as held:
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr("mtc.storage.lease.time.sleep", lambda _: pytest.fail("on the same machine nobody waits"))
            mine = held.enter_context(Lease(run, beat=0.05))
        other = {"id": "x", "host": "elsewhere", "pid": 7, "beat": 1}
        run.write("writer.json", json.dumps(other))
        mine._thread.join(10)  # it has nothing more to hold
        with pytest.raises(RunError, match="another job writes this run now, process 7 on elsewhere"):
            mine.require()
    assert json.loads(run.read("writer.json")) == other, "it is the other's now"
    with Lease(run, beat=60, stale=0.3):
        run.write("writer.json", json.dumps(other))
    assert json.loads(run.read("writer.json")) == other, "also where it was taken just before the end"
    with Lease(run, beat=0.05, stale=0.3):
        assert json.loads(run.read("writer.json"))["id"] != "x", "it was not alive"
