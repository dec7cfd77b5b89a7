"""The program that measures a GPU, on the CPU in its place: whole, broken, and what it imports."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import SECTIONS, STEPS
from benchmarks.gpu_checks import DeviceWatch, Findings, Waiting
from mtc.training.backends import MeasuredStep, choose_backend

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
OURS = ("mtc", "benchmarks", "cluster")
ON_A_GPU_MACHINE = {
    "torch", "numpy", "scipy", "pyarrow", "yaml", "fsspec", "filelock", "transformers", "tokenizers", "huggingface_hub",
    "safetensors",
}  # fmt: skip
BROUGHT_ALONG = {"pydantic", "pydantic_core", "tenacity"}  # with what pydantic needs; the docstring says so


def run(tmp_path: Path, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """In an environment with nothing of this process's."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    clean |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "MTC_CACHE": os.environ["MTC_CACHE"]}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False
    )


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    directory = tmp_path_factory.mktemp("gpu")
    saved = directory / "saved.json"
    command = ["-X", "importtime", "-m", "benchmarks.gpu", "--small", "--save", str(saved)]
    return run(directory, command), saved


def test_every_section_passes_with_the_cpu_in_the_gpus_place(whole: Any) -> None:
    done, saved = whole
    *sections, last = results(done)
    failed = [name for name, check in last["checks"].items() if not check["ok"]]
    assert done.returncode == 0 and not failed, done.stderr[-3000:]
    assert [line["section"] for line in sections] == list(SECTIONS)
    assert not any("failed" in line for line in sections)
    assert last == json.loads(saved.read_text())
    for line in sections:
        for name, check in line["checks"].items():
            assert last["checks"][f"{line['section']}: {name}"] == check
    expected = {
        "operations: bag_sums, one of 4,096 among short ones",
        "operations: bag_sums, no entries",
        "operations: nested_residuals, AuxK: gradient",
        "selection: largest_entries, ties",
        "selection: kth_largest, NaN and infinity",
        "losses: sparse, bfloat16, 64 dead",
        "losses: dense, bfloat16",
        "steps: without waits, sparse, float32",
        "steps: without waits, dense, float32",
        "steps: a NaN changes nothing, sparse, bfloat16",
        "steps: resumed, sparse, float32",
        "steps: again, to the last bit, sparse, float32",
        "steps: 50 steps as on the CPU: weights",
        "capture: units on the host, gemma2, eager",
        "capture: a NaN, gemma2, eager: other windows lose nothing",
        "attention: one row, bfloat16, capped, sliding",
        "attention: compilations",
        "model: compiled, gemma2, bfloat16",
        "model: nothing is compiled after warm_up, llama, float32",
        "upload: every row of 40 units",
        "upload: the shuffle buffer gives each row once",
        "inference: threshold",
        "inference: held-out pass: counts",
        "two_processes: rank 1 as one process: weights",
        "end_to_end: units arrive in order",
    }
    assert expected <= last["checks"].keys()
    assert last["figures"]["capture_figures"]["capture"].startswith("not measured")
    assert last["device"].startswith("no GPU") and last["versions"]["torch"] == torch.__version__


def test_it_imports_no_ray_and_only_what_a_machine_with_a_gpu_has(whole: Any) -> None:
    done, _ = whole
    loaded = set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.M))
    tops = {name.partition(".")[0] for name in loaded}
    assert {"mtc.training.trainer", "mtc.analysis.held_out", "benchmarks.gpu_stream", "cluster.mps"} <= loaded
    assert not tops & {"ray", "datasets", "pydantic_settings", "matplotlib", "fastapi"}
    asked = set()
    for name in loaded:
        if name.partition(".")[0] in OURS:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None
            asked |= {top for top in imports(Path(spec.origin)) if top in tops}
    assert asked - set(sys.stdlib_module_names) - set(OURS) == ON_A_GPU_MACHINE | BROUGHT_ALONG


def imports(file: Path) -> set[str]:
    """Top-level packages that a module of ours imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_what_is_wrong_and_what_raises_fail_and_the_rest_is_still_told(tmp_path: Path) -> None:
    """Here, and in another process once an error has cost this one the GPU, which the second one is taken to do."""
    code = """
import sys, benchmarks.gpu, benchmarks.gpu_checks as checks
right, answers = checks.bag_sums, iter([True, False])
checks.bag_sums = lambda *arguments: right(*arguments) * 1.001
checks.kth_largest = None
broken = benchmarks.gpu.SECTIONS["losses"]._replace(module="gpu_checks", function="nothing")
benchmarks.gpu.SECTIONS["losses"] = broken
benchmarks.gpu._alive = lambda *arguments: next(answers)
names = ["operations", "selection", "losses", "device"]
sys.exit(benchmarks.gpu.main([f"--only={name}" for name in names]))
"""
    done = run(tmp_path, ["-c", code], MTC_PRETEND_GPU="1")
    operations, selection, losses, device, last = results(done)
    assert done.returncode == 1
    wrong = operations["checks"]["bag_sums, every row"]
    assert not wrong["ok"] and wrong["error"] == pytest.approx(1e-3, rel=1e-2) and wrong["limit"] < wrong["error"]
    assert operations["checks"]["entry_dots, every row"]["ok"]
    assert selection["failed"].startswith("TypeError: ") and "Traceback" in done.stderr
    assert last["checks"]["selection"] == {"ok": False, "failed": selection["failed"]}
    assert losses["failed"].startswith("AttributeError: ")
    assert device["section"] == "device" and all(check["ok"] for check in device["checks"].values())
    assert last["checks"]["device: float32 products are not TF32's"]["ok"]
    assert set(last["figures"]) == {"operations", "selection", "losses", "device"}
    assert "FAILED operations: bag_sums, every row" in done.stderr and "FAILED selection\n" in done.stderr
    assert "sees no GPU" in done.stderr.splitlines()[0], "nobody takes this for a proof"
    assert not list(tmp_path.glob("mtc-gpu-*")), "something was left behind"
    assert gpu._alive(torch.device("cpu"))


def test_what_can_not_be_done_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "list.json").write_text("[1]")
    for options, words in (
        (["--save", str(tmp_path)], f"--save {tmp_path}: no file can be written there"),
        (["--save", str(tmp_path / "none" / "x.json")], "no file can be written there"),
        (["--require-gpu"], "--require-gpu: torch"),
        (["--record", str(tmp_path / "list.json")], f"--record {tmp_path}/list.json: TypeError"),
        (["--record", str(tmp_path / "none.json")], "No such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.main(options)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_list_names_the_sections_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SECTIONS)
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--only", "nothing"])
    assert refused.value.code == 2


def test_the_times_that_sections_are_given_are_less_than_six_minutes_together() -> None:
    assert sum(section.seconds for section in SECTIONS.values()) <= 355


def test_recorded_steps_decide_what_auto_takes(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(backend: str, milliseconds: float, tokens: int = 1024, dead: int = 0) -> dict[str, Any]:
        shape = {"device": "NVIDIA Test", "features": 4608, "tokens": tokens, "dead": dead, "kernels": 7}
        return shape | {"backend": backend, "bfloat16": False, "milliseconds": milliseconds}

    steps, saved = tmp_path / "gpu_steps.json", tmp_path / "saved.json"
    shutil.copy(STEPS, steps)
    before = json.loads(steps.read_text())
    for times in ({"dense": 1.0, "sparse": 2.0}, {"dense": 5.0, "sparse": 4.0}):
        rows = [row(backend, value) for backend, value in times.items()] + [row("dense", 0.1, dead=512)]
        saved.write_text(json.dumps({"figures": {"step_figures": {"steps": rows}}}))
        assert gpu.main(["--record", str(saved), "--steps", str(steps)]) == 0
        found = json.loads(steps.read_text())
        assert len(found) == len(before) + 2
        measured = tuple(MeasuredStep(**entry) for entry in found)
        assert choose_backend("NVIDIA Test", 4608, 1024, False, measured)[0] == min(times, key=times.get)  # type: ignore[arg-type]
    kept = [entry for entry in json.loads(steps.read_text()) if entry["device"] != "NVIDIA Test"]
    assert kept == sorted(before, key=lambda entry: list(entry.values()))
    with pytest.raises(SystemExit) as refused:  # of a machine without a GPU
        gpu.main(["--record", str(whole[1]), "--steps", str(steps)])
    assert refused.value.code == 2 and "no times of steps" in capsys.readouterr().err


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "assigned by a mask": lambda x: x.index_put_((x > 0,), x[:2]),
    "unique": lambda x: x.unique(),
    "counts": lambda x: torch.bincount(x.long().abs()),
    "repeats": lambda x: x.repeat_interleave(x.long().abs()),
    "equal": lambda x: torch.equal(x, x),
    "another device": lambda x: x.to("meta"),
}
GOES_ON: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
    "a view": (lambda x: x[2:].view(-1).t().detach(), 0),
    "a sum of a view": (lambda x: x[2:].sum(), 1),
    "filled by a mask": (lambda x: x.masked_fill_(x > 0, 0), 2),
    "a sort": (lambda x: x.sort(), 1),
    "repeats of known size": (lambda x: x.repeat_interleave(torch.ones(8, dtype=torch.int64), output_size=8), 3),
    "on its way": (lambda x: x.to("meta", non_blocking=True), 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_operations_that_make_the_host_wait_are_noticed(name: str) -> None:
    x = torch.tensor([1.0, -2, 0, 3, 0, 0, 1, 2])
    with pytest.raises(Waiting), DeviceWatch():
        WAITS[name](x)


@pytest.mark.parametrize("name", GOES_ON)
def test_operations_that_start_kernels_are_counted(name: str) -> None:
    function, launches = GOES_ON[name]
    x = torch.tensor([1.0, -2, 0, 3, 0, 0, 1, 2])
    with DeviceWatch() as watch:
        function(x)
    assert watch.launches == launches


def test_the_worst_of_a_checks_errors_is_kept() -> None:
    findings = Findings()
    for error in (0.1, 0.5, 0.2):
        findings.compare("within", error, 1.0)
    for error in (0.1, float("nan"), 0.2):
        findings.compare("not within", error, 1.0)
    findings.check("once", True)
    findings.check("once", False, what="the second")
    findings.check("once", True)
    assert findings.checks["within"] == {"ok": True, "error": 0.5, "limit": 1.0}
    assert not findings.checks["not within"]["ok"]
    assert findings.checks["once"] == {"ok": False, "what": "the second"}
