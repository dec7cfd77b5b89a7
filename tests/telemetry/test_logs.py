"""What a job tells, and what it keeps quiet."""

import json
import logging
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from mtc.config import ConfigError
from mtc.telemetry import logs

ROOT = Path(__file__).parents[2]
SAYS = """
import logging, os, sys
from mtc.telemetry.logs import configure, fail, prints_left_out, say, set_run
configure(verbose={verbose}, form={form!r})
set_run("a-run")
say("trained", "trained 10 tokens", tokens=10, message="not this")
logging.getLogger("mtc.storage.lease").warning("storage is %s", "slow")
logging.getLogger("ray.data").info("planning")
with prints_left_out({verbose}):
    print("(raylet) noise")
    say("inside", "in between")
print("after")
fail("error", "error: all is lost")
"""


def run(verbose: bool, form: str | None, environment: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    code = SAYS.format(verbose=verbose, form=form)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | (environment or {})
    )
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_lines_for_people_have_time_and_run() -> None:
    out, err = run(False, None)
    assert [line[8:] for line in out[:2]] == [" a-run  trained 10 tokens", " a-run  in between"]
    datetime.strptime(out[0][:8], "%H:%M:%S")
    assert out[2:] == ["after"], "what others print meanwhile is left out"
    assert [line[8:] for line in err[:1]] == [" a-run  warning: mtc.storage.lease: storage is slow"]
    assert err[1:] == ["error: all is lost"]


@pytest.mark.parametrize("by_option", [True, False])
def test_lines_for_machines_are_objects_with_the_run(by_option: bool) -> None:
    out, err = run(False, "json" if by_option else None, {"MTC_LOG_FORMAT": "text" if by_option else "json"})
    first = json.loads(out[0])
    assert (first["event"], first["run_id"], first["tokens"]) == ("trained", "a-run", 10)
    assert first["message"] == "trained 10 tokens", "a field cannot replace what every line has"
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    warning, error = map(json.loads, err)
    assert (warning["level"], warning["logger"], warning["message"]) == (
        "warning",
        "mtc.storage.lease",
        "storage is slow",
    )
    assert (error["level"], error["event"], error["run_id"]) == ("error", "error", "a-run")


def test_verbose_brings_back_what_others_say() -> None:
    out, err = run(True, "text")
    assert any("planning" in line for line in err)
    assert any("(raylet) noise" in line for line in err)
    assert "after" in out


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    before = logging.getLogger().handlers[:]
    with pytest.raises(ConfigError, match="MTC_LOG_FORMAT=xml: text or json"):
        logs.configure()
    assert logging.getLogger().handlers == before
    command = [sys.executable, "jobs/train.py", "--preset", "tiny", "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: MTC_LOG_FORMAT=xml: text or json is wanted\n")


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What jobs say of themselves, by job and option; from one process."""
    code = """
import contextlib, io, json, runpy, sys
found = {}
for job, option in [(j, "--help") for j in ("train", "analyze", "export", "status")] + [("train", "--help-fields")]:
    sys.argv, said = [f"jobs/{job}.py", option], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, job
    found[f"{job} {option}"] = said.getvalue()
assert not {"torch", "transformers", "ray"} & set(sys.modules), "these take seconds, and help is wanted at once"
print(json.dumps(found))
"""
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("job", ["train", "analyze", "export", "status"])
def test_help_fits_a_screen_and_names_the_exit_codes(job: str, helps: dict[str, str]) -> None:
    lines = helps[f"{job} --help"].splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    assert "Exit codes: 0" in "\n".join(lines)


def test_every_field_is_explained(helps: dict[str, str]) -> None:
    said = helps["train --help-fields"]
    assert "--transcoder.group_sizes" in said and "--cluster.metrics_port" in said
