"""Where a Ray of one's own can run, and what it says where it can't."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from cluster.local_ray import LONGEST_PROXY_ROOT, LONGEST_ROOT, check_installation, temporary_root
from cluster.pipeline import connected
from jobs import quickstart
from mtc.config import ConfigError
from serve.contract import proxy_files


@pytest.fixture(params=["/opt/my env", "/opt/my\tenv"])
def prefix(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "prefix", request.param)
    path: str = request.param
    return path


def test_an_environment_with_whitespace_in_its_path_is_refused_before_ray_starts(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=rf"path holds whitespace: {prefix};"), connected():
        pass
    monkeypatch.setattr(quickstart, "STATE", tmp_path / "head.json")
    assert quickstart.main(["run", "--preset", "tiny"]) == 2
    assert prefix in capsys.readouterr().err
    assert not quickstart.STATE.exists()


def test_an_ordinary_environment_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/home/rené/it's-fine")
    check_installation()


def test_a_ray_that_does_not_start_is_told_in_one_line(tmp_path: Path) -> None:
    tiny = ["--preset", "tiny", "--output.root", str(tmp_path)]
    environment = os.environ | {"RAY_OVERRIDE_RESOURCES": "{"}  # read after the head's first processes were started
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *tiny], env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("failed: a Ray of this process's own did not start: JSONDecodeError: Expecting")
    assert Path(last.rpartition(" ")[2]).is_dir(), last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_rays_files_lie_where_sockets_can(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(variable, raising=False)
    assert temporary_root() == "/tmp"
    for unfit in ("/dev/shm/a b", "/dev/shm/é", "dev", "/dev/shm/" + "x" * LONGEST_ROOT):
        monkeypatch.setenv(name, unfit)
        assert temporary_root() == "/tmp"
    monkeypatch.setenv(name, "/dev/shm")
    assert temporary_root() == "/dev/shm"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="neither in /dev/shm nor in /tmp"):
        temporary_root()


def test_the_longest_sockets_paths_are_short_enough() -> None:
    node, pid = "0" * 56, "4194304"
    session = f"session_2026-11-28_21-16-31_543210_{pid}"
    sockets = [f"{'r' * LONGEST_ROOT}/ray-4294967294/{session}/sockets/plasma_store"]
    head = "r" * LONGEST_PROXY_ROOT + "/mtc-xxxxxxxx"
    sockets.append(f"{head}/{session}/sockets/plasma_store")
    for name, path in proxy_files(head).items():
        if "SOCKET" in name:  # Serve puts it into a directory of the node's; HAProxy makes it under another name first
            sockets.append(f"{Path(path).parent}/{node}/{Path(path).name}" + f".{pid}.tmp" * ("METRICS" not in name))
    assert len(sockets) == 4
    assert max(map(len, sockets)) <= 107


def test_each_of_the_proxys_files_is_moved() -> None:
    code = "from ray.serve._private import constants as c; "
    code += "print([n for n, v in vars(c).items() if n.isupper() and '/tmp/' in str(v)])"
    for moved, left in ({}, 5), (proxy_files("/d"), 0):
        environment = {name: value for name, value in os.environ.items() if "HAPROXY" not in name} | moved
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert len(ast.literal_eval(done.stdout)) == left
