"""docs/examples/train.sbatch, run by bash with programs in the place of Slurm's and Ray's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "train.sbatch"
RAY = """case "$1 $2" in
    "start --head") echo "head ${@: -1} $*" >> "$LOG"; exec sleep 600 ;;
    "start "*) exec sleep 600 ;;
    "status "*) printf ' 1 node_a\\n 1 node_b\\n' ;;
    "job submit") echo "$*" >> "$LOG"; echo $$ > "$LOG.pid"; echo submitted; read -r < "$LOG.fifo" || true
        [ "$SAID" = none ] || echo "ends with exit code $SAID"; exit "$RAY_CODE" ;;
    "job stop") echo "$*" >> "$LOG"; echo > "$LOG.fifo" ;;
esac
"""
PROGRAMS = {
    "scontrol": 'if [ "$1" = show ]; then printf "one\\ntwo\\n"; else echo "scontrol $*" >> "$LOG"; fi\n',
    "srun": 'while [[ "$1" = --* ]]; do shift; done; exec "$@"\n',
    "hostname": 'if [ "$1" = --ip-address ]; then echo 127.0.1.1; else echo "fe80::1 10.1.2.3 172.17.0.1 "; fi\n',
    "ray": RAY,
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of the script, in a checkout of its own."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "log.fifo")
    (tmp_path / "log").touch()
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mtc", "SLURM_JOB_NODELIST": "x"}
    return os.environ | slurm | {"PATH": path, "SHARED": f"{tmp_path}/shared", "LOG": f"{tmp_path}/log"}


def start(job: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", SCRIPT, "--preset", "tiny"], env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("said", "ray", "code", "again"),
    [("none", "0", 0, False), ("1", "1", 1, True), ("2", "1", 2, False), ("3", "1", 3, False), ("none", "1", 1, True)],
)
def test_the_exit_code_of_the_job_decides(job: dict[str, str], said: str, ray: str, code: int, again: bool) -> None:
    """Ray's own is 1 for all but 0."""
    script = start(job | {"SAID": said, "RAY_CODE": ray})
    Path(f"{job['LOG']}.fifo").write_text("\n")
    out = script.communicate(timeout=60)[0]
    log = Path(job["LOG"]).read_text()
    assert script.returncode == code, out
    assert ("scontrol requeue 7" in log) == again
    assert "--node-ip-address=10.1.2.3 --port=6379" in log and "127.0.1.1" not in log
    assert "--preset tiny --output.root" in log and "submitted\n" in out
    assert list(Path(job["SHARED"]).iterdir()) == [], "the token is removed"


def test_it_is_not_queued_again_for_ever(job: dict[str, str]) -> None:
    script = start(job | {"SAID": "1", "RAY_CODE": "1", "SLURM_RESTART_COUNT": "20"})
    Path(f"{job['LOG']}.fifo").write_text("\n")
    script.communicate(timeout=60)
    assert script.returncode == 1
    assert "requeue" not in Path(job["LOG"]).read_text()


def test_when_time_is_over_the_job_is_stopped_and_queued_again(job: dict[str, str]) -> None:
    """Slurm signals the script alone, as `--signal=B:TERM@120` says; Ray ends a stopped job with 0."""
    assert "#SBATCH --signal=B:TERM@" in SCRIPT.read_text() and "#SBATCH --requeue" in SCRIPT.read_text()
    script = start(job | {"SAID": "130", "RAY_CODE": "0"})
    assert script.stdout
    assert script.stdout.readline() == "submitted\n"  # of the job, so the script waits for it
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 130
    log = Path(job["LOG"]).read_text().splitlines()
    assert log[-2].startswith("job stop ") and log[-2].endswith(" mtc-7-0")
    assert log[-1] == "scontrol requeue 7"
