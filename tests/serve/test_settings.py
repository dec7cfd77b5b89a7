"""What is typed wrong for the service: told in our words, before Ray is looked for."""

from __future__ import annotations

import math
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
from pydantic import ValidationError

from serve.app import main
from serve.contract import ENVIRONMENT, Settings
from serve.contract.schemas import EncodeRequest
from serve.environment import LONGEST
from serve.environment import main as print_environment
from serve.http.errors import invalid
from serve.keys import main as make_keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set num_cpus=x", "num_cpus: a number is wanted, got 'x'"),
        ("--set max_inputs=2.5", "max_inputs: a whole number is wanted, got '2.5'"),
        ("--set request_timeout_s=inf", "request_timeout_s: a finite number is wanted, got 'inf'"),
        (
            "--set max_input=3",
            "max_input: there is no such field, got '3'; did you mean max_inputs or max_input_tokens?",
        ),
        ("--set max_inputs", "--set max_inputs: NAME=VALUE is wanted"),
        ("--set num_replicas=3 --set max_replicas=2", "max_replicas=2 is less than num_replicas=3"),
        ("--set max_replicas=[1", "max_replicas: a whole number is wanted, got '[1'"),
        ("--port 99999", "--port 99999: 1 to 65535 is wanted"),
        ("--keys /nowhere/keys.json", "/nowhere/keys.json cannot be read: No such file or directory"),
        (
            "--run s4://bucket/latest",
            "s4://bucket/latest: Protocol not known: s4; a directory, s3:// or gs:// is wanted",
        ),
    ],
)
def test_wrong_options_of_the_service(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was looked for"))
    assert main(["--run", "/nowhere", *shlex.split(options)]) == 2
    assert capsys.readouterr().err == f"serve.app: {message}\n"


def test_every_number_of_the_service_has_its_bounds() -> None:
    for name, field in Settings.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        wrong: list[Any] = [math.nan, math.inf, -1, 1e308, 2**63, "x"] if kinds & {int, float} else []
        wrong += [0] if wrong and name not in ("num_gpus", "interventions_num_gpus", "max_surge_percent") else []
        for value in wrong:
            with pytest.raises(ValidationError):
                pytest.fail(f"{name}={value}: {Settings(run='x', **{name: value})}")


@pytest.mark.parametrize(
    "body",
    [{"input_ids": [[1], ["x"]]}, {"input_ids": [[-1]]}, {"input_ids": "x"}, {"input_ids": [1.5]}, {"inputs": [1]}],
)  # fmt: skip
def test_an_answer_names_fields_and_not_how_they_are_checked(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        EncodeRequest.model_validate(body)
    answer = invalid(error.value)
    assert {fault["field"].split(".")[0] for fault in answer.detail} == set(body)
    for part in {part for fault in answer.detail for part in fault["field"].split(".")[1:]}:
        assert part.isdecimal(), answer.message


def test_a_shell_takes_the_environment_of_a_ray_that_serves(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_environment([]) == 0
    usual = capsys.readouterr().out
    assert print_environment(["/tmp/it's"]) == 0
    own = capsys.readouterr().out
    found = {}
    for script in (usual, own):
        shown = subprocess.run(
            ["sh", "-c", f"{script}env -0"], env={}, capture_output=True, text=True, check=True
        ).stdout
        found[script] = dict(line.split("=", 1) for line in shown.split("\0") if line.startswith("RAY_"))
    assert found[usual] == ENVIRONMENT
    assert found[own].items() >= ENVIRONMENT.items()
    assert found[own]["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == "/tmp/it's/haproxy.cfg"
    for directory, message in (("/tmp/" + "x" * LONGEST, "at most 27"), ("/dev/null", "no directory")):
        assert print_environment([directory]) == 2
        assert message in capsys.readouterr().err


def test_a_file_of_keys_that_cant_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for name, file, message in (
        ("me", tmp_path / "nowhere" / "keys.json", "cannot be written: No such file or directory"),
        ("me", tmp_path / "file" / "keys.json", "cannot be written: Not a directory"),
        ("", tmp_path / "keys.json", "NAME: 1 to 100 characters are wanted, got 0"),
    ):
        assert make_keys(["add", name, "--file", str(file)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("serve.keys: ") and err.endswith(f"{message}\n")
