"""The quickstart without a Ray: what it prints of a run that lies anywhere, and that it leaves no process."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import quickstart
from mtc.config import load_preset, to_yaml
from mtc.storage import RunDirectory

ANSWER = {"results": [{"tokens": ["<s>", " tax"], "is_special": [True, False], "features": [[], [
    {"feature_index": 3, "activation_value": 1.5}
]]}]}  # fmt: skip


@pytest.mark.parametrize("remote", [True, False])
def test_a_run_is_shown_wherever_its_root_is(
    remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names, served, layers = list[str](), list[str](), [1]
    root = "memory://quickstart/runs" if remote else str(tmp_path)

    def train(head: dict[str, Any], name: str, arguments: list[str]) -> None:
        names.append(name)
        table = io.BytesIO()
        pq.write_table(
            pa.table({"feature": [3], "label": ["' levy', ' duty' (80 %)"], "massive": [False]}),
            table,
        )
        run = RunDirectory(
            f"{arguments[arguments.index('--output.root') + 1]}/{arguments[arguments.index('--output.run_id') + 1]}"
        )
        run.write("config.yaml", to_yaml(load_preset("tiny", {"model": {"layers": layers}})))
        run.members()[f"layer{min(layers)}"].write("features.parquet", table.getvalue())  # of the layer that answers
        run.write("report/report.md", "# Report")

    monkeypatch.setattr(quickstart, "start_head", lambda: {"metrics_port": 1})
    monkeypatch.setattr(quickstart, "submit_job", train)
    monkeypatch.setattr(quickstart, "serve_run", lambda head, run: served.append(run) or "http://127.0.0.1:1")
    monkeypatch.setattr(quickstart, "ask", lambda base, text: ANSWER)
    assert quickstart.main(["run", "--", "--output.run_id", "x"]) == 1
    assert "--run-id" in capsys.readouterr().err
    assert quickstart.main(["run", "--preset", "tiny", "--root", root]) == 0
    printed = capsys.readouterr().out
    assert "#3 (1.50): ' levy', ' duty' (80 %)" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("report ")]
    assert line.removeprefix("report ").strip().startswith(f"{root}/tiny-") and line.endswith("/report/report.md")
    assert quickstart.main(["run", "--preset", "tiny", "--root", root, "--run-id", "mine"]) == 0
    assert f"{root}/mine/report/report.md" in capsys.readouterr().out
    assert names[1].startswith("mine-"), "Ray runs no job again under a name that it has had"
    layers[:] = [1, 0]
    assert quickstart.main(["run", "--preset", "tiny", "--root", root, "--run-id", "two"]) == 0
    printed = capsys.readouterr().out
    assert [run.removeprefix(root) for run in served[1:]] == ["/mine", "/two"]
    assert "layers     0, 1 are served as one" in printed and "else layer 0 answers" in printed
    assert f"{root}/two/report/report.md" in printed


def test_a_job_that_left_no_run_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "start_head", lambda: {"metrics_port": 1})
    monkeypatch.setattr(quickstart, "submit_job", lambda *arguments: None)
    assert quickstart.main(["run", "--root", str(tmp_path), "--run-id", "x", "--", "--print-config"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/x has no file 'config.yaml'\n"


def test_a_mistake_starts_no_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "start_head", lambda: pytest.fail("a head was started"))
    (tmp_path / "file").write_text("")
    root = str(tmp_path / "runs")
    for command, message in (
        (["run", "--preset", "tinny"], "--preset 'tinny' is unknown"),
        (["run", "--preset", "tiny", "--root", root, "--", "--transcoder.k", "x"], "transcoder.k: a whole number"),
        (["run", "--preset", "tiny", "--root", root, "--run-id", "a b"], "output.run_id: "),
        (["run", "--preset", "tiny", "--root", f"{tmp_path}/file"], f"--root {tmp_path}/file: "),
        (["serve", "--run", root], f"no run at {root}"),
    ):
        assert quickstart.main(command) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_does_not_answer_is_not_said_to_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "ready", "model": {"run_id": "before"}}).encode())

        def log_message(self, *arguments: Any) -> None: ...

    for name in ("before", "wanted"):
        RunDirectory(str(tmp_path / name)).publish()
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(quickstart, "git_revision", lambda: None)
    monkeypatch.setattr(quickstart, "_runs", lambda head: True)
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        head = {"address": "127.0.0.1:1", "http_port": server.server_port, "serves": True}
        base = quickstart.serve_run(head, str(tmp_path / "before"))
        with pytest.raises(quickstart.QuickstartError, match=f"{base} answers with the run before, not with wanted"):
            quickstart.serve_run(head, str(tmp_path / "wanted"))
        server.shutdown()


def test_ctrl_c_while_the_head_starts_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes as soon as the head's process is there."""
    (tmp_path / "ray").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "ray").chmod(0o755)
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> None:
        started.append(popen(*arguments, **options))
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(quickstart, "STATE", tmp_path / "state" / "head.json")
    monkeypatch.setattr(quickstart, "_tool", lambda name: str(tmp_path / name))
    monkeypatch.setattr(quickstart, "git_revision", lambda: None)
    monkeypatch.setattr(quickstart, "check_servable", lambda url: None)
    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        assert quickstart.main(["serve", "--run", "runs/latest"]) == 130
        started[0].wait(timeout=10)
        assert not quickstart.STATE.exists()
    finally:
        for process in started:
            process.kill()


HEAD = """#!{python}
import http.server, json, os, sys
class Dashboard(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"session_name": "session_" + str(os.getpid())}}).encode())
    def log_message(self, *arguments):
        pass
port = next(word.split("=")[1] for word in sys.argv if word.startswith("--dashboard-port="))
server = http.server.HTTPServer(("127.0.0.1", int(port)), Dashboard)
starts = os.path.join(os.path.dirname(__file__), "too slow")
if os.path.exists(starts) and (left := int(open(starts).read())):
    open(starts, "w").write(str(left - 1))
    server.handle_request()
    sys.exit("Exception: The current node timed out during startup. This could happen because ...")
print("Ray runtime started.", flush=True)
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a `ray` that is only a dashboard, whose node comes too late as often as `too slow` says."""
    (tmp_path / "ray").write_text(HEAD.format(python=sys.executable))
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setattr(quickstart, "_tool", lambda name: str(tmp_path / name))
    monkeypatch.setattr(quickstart, "git_revision", lambda: None)
    return tmp_path


def test_a_head_whose_node_comes_too_late_is_started_again(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dashboard answers for a while, though there will be no node."""
    monkeypatch.setattr(quickstart, "STATE", stand_in / "state" / "head.json")
    slow = stand_in / "too slow"
    try:
        slow.write_text("2")
        head = quickstart.start_head()
        assert slow.read_text() == "0"
        assert quickstart.start_head() == head and len(quickstart._processes(head)) == 1
        assert quickstart.stop_head()
        slow.write_text("3")
        with pytest.raises(quickstart.QuickstartError, match=r"not ready in Ray's 30 s, 3 times; see .*head\.log"):
            quickstart.start_head()
        assert not quickstart.STATE.exists()
    finally:
        quickstart.stop_head()


def test_a_head_of_an_older_version_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "STATE", tmp_path / "head.json")
    (tmp_path / "ray").mkdir()
    head = {"temporary": str(tmp_path / "ray"), "address": "127.0.0.1:1", "dashboard": "http://127.0.0.1:1"}
    (tmp_path / "head.json").write_text(json.dumps(head | {"http_port": 8000, "metrics_port": 1}))
    mark = {quickstart.MARK: head["temporary"]}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=os.environ | mark) as process:
        assert quickstart.main(["stop"]) == 0
        process.wait(30)
    assert capsys.readouterr().out == "stopped\n"
    assert not list(tmp_path.iterdir())


def test_a_head_is_its_own_checkouts_alone(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkouts, of which one is a copy of the other, made while its head ran; processes with a dashboard stand for
    the heads."""
    first, copy = stand_in / "first", stand_in / "copy"

    def use(checkout: Path) -> None:
        monkeypatch.setattr(quickstart, "STATE", checkout / "head.json")

    try:
        use(first)
        head = quickstart.start_head()
        assert quickstart.start_head() == head, "a running head is used again"
        shutil.copytree(first, copy)
        use(copy)
        assert quickstart.main(["stop"]) == 0
        said = capsys.readouterr()
        assert said.out.endswith("nothing was running\n") and "is a copy" in said.err
        use(first)
        assert quickstart.start_head() == head
        shutil.copytree(first, copy, dirs_exist_ok=True)
        use(copy)
        other = quickstart.start_head()
        assert other["dashboard"] != head["dashboard"]
        use(first)
        assert quickstart.start_head() == head
        use(copy)
        assert quickstart.stop_head()
        use(first)
        moved = stand_in / "moved"
        first.rename(moved)
        use(moved)
        assert quickstart.start_head() == head, "a checkout may be moved"
        # Its head dies, and another Ray takes the address before anybody looks.
        for process in quickstart._processes(head):
            process.kill()
            process.wait(10)
        port = head["dashboard"].rpartition(":")[2]
        with subprocess.Popen([sys.executable, stand_in / "ray", f"--dashboard-port={port}"]) as stranger:
            deadline = time.monotonic() + 30
            while not quickstart._answers(head["dashboard"]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert quickstart.start_head()["dashboard"] != head["dashboard"]
            assert quickstart.stop_head()
            assert stranger.poll() is None
            stranger.kill()
    finally:
        for checkout in (first, copy, stand_in / "moved"):
            if checkout.exists():
                use(checkout)
                quickstart.stop_head()


def test_of_what_ray_says_about_a_job_only_the_jobs_own_lines_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "2026-11-25 19:30:05,123\\tINFO cli.py:41 -- Job submission server address: http://127.0.0.1:8265",
        "19:30:05 a-run  trained 49,152 tokens",
        "[2026-11-25 19:30:05,1 E 7 7] core_worker.cc:2465: Actor X has constructor arguments in the object store and",
    ]
    (tmp_path / "ray").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines).replace("\\t", "\t") + "\nEND\n")
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setattr(quickstart, "_tool", lambda name: str(tmp_path / name))
    quickstart.submit_job({"dashboard": "http://127.0.0.1:1"}, "a-run", [])
    assert capsys.readouterr().out.splitlines()[1:] == [lines[1]]
