"""`mtc`: its table, how programs are started and end under it, its help, and the completion of the shell."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.command_line import run_program
from mtc import programs
from mtc.command import COMMANDS, help_text
from mtc.config import RunConfig, preset_names

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"command_line", "label_models", "label_vectors"}
"""Modules of jobs/ that are no programs."""
START = "import sys; from mtc.command import main; sys.exit(main())"


def mtc(*arguments: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, as the console script starts it, where the source tree is not."""
    return subprocess.run(
        [sys.executable, "-c", START, *arguments], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


# The table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_program(command: str) -> None:
    module, purpose = COMMANDS[command]
    assert find_spec(module), f"`mtc {command}` is {module}, which is not there"
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert re.search(r"^def main\(argv: .*\) -> int:", source, re.MULTILINE), f"{module} has no main(argv) -> int"
    assert purpose and purpose[0].islower()


def test_every_program_has_its_command() -> None:
    known = {module for module, _ in COMMANDS.values()}
    jobs = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")} - {f"jobs.{name}" for name in HELPERS}
    assert jobs - {"jobs.__init__"} | {"serve.app", "serve.keys", "serve.environment"} <= known


def test_help_is_a_screen() -> None:
    lines = help_text().splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120
    for command in COMMANDS:
        assert any(line.split()[:1] == [command] for line in lines)


# How programs are started --------------------------------------------------------------------------------------------


def test_help_loads_none_of_the_heavy_packages(tmp_path: Path) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pydantic', 'numpy', 'yaml'}"
    code = f"import sys; from mtc.command import main; main(['--help']); print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.decode().splitlines()[-1] == "[]", done.stderr


def test_what_is_no_command(tmp_path: Path) -> None:
    done = mtc("trian", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "mtc: 'trian' is no command; did you mean train?", f"commands: {', '.join(COMMANDS)}"
    ]  # fmt: skip
    assert mtc("--version", cwd=tmp_path).stdout.startswith("mtc ")


@pytest.mark.parametrize("other", ["cluster", "jobs", "serve"])
def test_a_package_of_the_same_name_is_not_taken(other: str, tmp_path: Path) -> None:
    stranger = tmp_path / "strangers" / other
    stranger.mkdir(parents=True)
    (stranger / "__init__.py").write_text("raise ImportError('a stranger')")
    done = mtc("quickstart", "--help", cwd=tmp_path, PYTHONPATH=f"{stranger.parent}:{ROOT}")  # it imports all three
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: mtc quickstart ")


def test_a_program_says_how_it_was_started(tmp_path: Path) -> None:
    by_name = mtc("train", "--presett", "tiny", cwd=tmp_path)
    script = subprocess.run(
        [sys.executable, ROOT / "jobs/train.py", "--presett", "tiny"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert by_name.returncode == script.returncode == 2
    assert by_name.stderr == script.stderr.replace("train.py", "mtc train")
    helped = mtc("analyze", "--help", cwd=tmp_path).stdout
    assert helped.startswith("usage: mtc analyze (--run RUN") and "    mtc analyze --run runs/latest " in helped
    assert "python jobs/" not in helped


ENDS = """
import os, sys, threading
from jobs.command_line import run_program
from mtc.telemetry import configure
configure()
threading.Thread(target=threading.Event().wait).start()  # as one that waits for Ray Train, for ever
run_program(lambda argv: print(argv) or 3, ["a"])
"""


@pytest.mark.parametrize(
    ("environment", "last"),
    [({}, ""), ({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "ends with exit code 3\\n")], ids=["alone", "as a job of Ray"],
)  # fmt: skip
def test_a_program_ends_whoever_still_waits(environment: dict[str, str], last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDS], env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "['a']\n", last.replace("\\n", "\n"))


def test_a_program_without_a_fault_returns() -> None:
    run_program(lambda argv: 0)


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        ("", {"env_vars": {"PYTHONPATH": "{0}:${PYTHONPATH}"}}),
        ('{"runtime_env": {"working_dir": "gcs://x.zip"}}', {"env_vars": {"PYTHONPATH": "{0}:${PYTHONPATH}"}}),
        ('{"runtime_env": {"env_vars": {"PYTHONPATH": "/mine"}}}', {}),  # twice, Ray refuses it
    ],
)
def test_workers_of_a_cluster_find_the_wheels_programs(
    job: str, wanted: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert programs.runtime_env() == {} and programs.directory() == str(ROOT), "a source tree"
    monkeypatch.setattr(programs, "INSTALLED", tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job)
    told = {name: {k: v.replace("{0}", str(tmp_path)) for k, v in more.items()} for name, more in wanted.items()}
    assert programs.runtime_env() == told


def test_programs_come_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/site-packages"])
    monkeypatch.setenv("PYTHONPATH", f"/other:{ROOT}")
    programs.put_first()
    assert sys.path == [str(ROOT), "/site-packages"]
    assert os.environ["PYTHONPATH"] == f"{ROOT}:/other"


# The shell's completion ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """What a bash with the script offers at the end of a line."""
    path = tmp_path_factory.mktemp("completion") / "mtc"
    done = mtc("completion", "bash", cwd=path.parent)
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)

    def at_the_end_of(line: str) -> set[str]:
        words = line.split(" ")
        asked = (
            f'. {path}; complete -p mtc | grep -q -- "-F _mtc" || exit 1; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        )
        asked += '_mtc; printf "%s\\n" "${COMPREPLY[@]}"'
        command = ["bash", "--norc", "-c", asked, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return at_the_end_of


def test_completion(complete: Callable[[str], set[str]]) -> None:
    assert complete("mtc ") == set(COMMANDS)
    assert complete("mtc st") == {"status"}
    assert complete("mtc train --preset ") == set(preset_names())
    assert complete("mtc train --preset smollm2-135m-a") == {"smollm2-135m-all-layers"}
    fields = {f"--transcoder.{name}" for name in RunConfig.model_fields["transcoder"].annotation.model_fields}  # type: ignore[union-attr]
    assert complete("mtc train --preset tiny --transcoder.") == fields
    assert complete("mtc check --no") == {"--nodes"}
    assert complete("mtc train --no") == set()
    assert complete("mtc export --format ") == {"saelens", "circuit-tracer", "gemma-scope-npz", "neuronpedia"}
    assert {"run", "serve", "stop", "--preset"} <= complete("mtc quickstart ")
    assert complete("mtc keys a") == {"add"}
    assert complete("mtc completion ") - {"-h", "--help"} == {"bash", "zsh"}


def test_completion_for_zsh(tmp_path: Path) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "mtc").write_text(mtc("completion", "zsh", cwd=tmp_path).stdout)
    asked = f"autoload -Uz compinit && compinit -D; . {tmp_path}/mtc; emulate ksh; "
    asked += "COMP_WORDS=(mtc st); COMP_CWORD=1; _mtc; print -l $COMPREPLY"
    done = subprocess.run([zsh, "-f", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["status"], done.stderr
