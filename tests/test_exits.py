"""How jobs end: the exit code, and the last line that says why."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mtc.storage import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--preset", "tiny", "--cluster.num_model_actors", "1", "--cluster.num_trainers", "1")


def start(job: str, *options: str) -> subprocess.Popen[str]:
    """A job with a Ray of its own; its last words are JSON."""
    command = [sys.executable, f"jobs/{job}.py", *options, "--log-format", "json"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(job: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and last line on standard error."""
    try:
        out, err = job.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    assert err, out
    return job.returncode, json.loads(err.splitlines()[-1])


def test_a_run_that_another_job_takes(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    job = start("train", *TINY, "--output.root", str(tmp_path), "--output.run_id", "run")
    while not run.exists("writer.json"):
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    run.write("writer.json", json.dumps({"id": "x", "host": "elsewhere", "pid": 7, "beat": 1}))
    code, last = end(job)
    assert (code, last["event"]) == (2, "error")
    assert last["message"].endswith("run_id=run: another job writes this run now, process 7 on elsewhere")
    assert run.exists("writer.json"), "it is the other's now"
    assert not run.is_finished()
