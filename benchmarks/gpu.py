"""Whether everything that is written for a GPU is right on this one, and how fast it is.

`python -m benchmarks.gpu [--only SECTION ...] [--small] [--save FILE] | --record FILE | --list`

From the repository's root, in less than 6 minutes on an H100 or H200; nothing is downloaded, models are random, no Ray
runs. After each section one JSON object stands on a line: its checks, each against an independent truth (float64 on the
CPU, a stable sort, autograd, the CPU's own branches), its figures, and its seconds. A section that raises has `failed`
instead and counts as a failed check. Sections that may hang come last, so that a time-out keeps the others' results;
where an error leaves the GPU useless for this process, another one goes on.
The last line is one object with everything; the exit status is 1 if a check failed. Targets that are missed are figures
with `met: false`, not failures. Where a section's time is over, figures are repeated less often or left out.

Without a GPU the same checks run in small shapes with the CPU in its place (MTC_PRETEND_GPU=1), in a minute; figures
that need a GPU say so. The step figures that `--save` wrote go with `--record` into mtc/training/gpu_steps.json, from
which `optimizer.backend: auto` chooses.

Needs torch >= 2.11 with Triton and a C compiler, Python >= 3.11, transformers >= 5.17 (with tokenizers, huggingface-hub
and safetensors), numpy, scipy, pyarrow, pyyaml, fsspec, filelock, tenacity and pydantic >= 2.7. Where only the last two
are missing, the wheels of tenacity, pydantic, pydantic-core, annotated-types and typing-inspection in a directory on
PYTHONPATH are enough (typing-extensions comes with torch): no other package of `pip install mtc` is imported.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from benchmarks.gpu_checks import Findings, Setting

STEPS = Path(__file__).parent.parent / "mtc/training/gpu_steps.json"
MEMORY_BYTES = 12e9
"""Free main memory from which models and the stream's ring lie there."""


class Section(NamedTuple):
    """A function (setting, findings) of its own name, in a module that is imported when its turn comes: where a package
    is missing the sections that do without it still run, and started processes import only what they need."""

    module: str
    seconds: float
    """Time that it has; what earlier sections left over comes on top."""
    function: str = ""
    """Name of the function where it is not the section's."""


SECTIONS = {
    "device": Section("gpu_checks", 2),
    "operations": Section("gpu_checks", 10),
    "selection": Section("gpu_checks", 15),
    "losses": Section("gpu_training", 15),
    "steps": Section("gpu_training", 20),
    "rates": Section("gpu_figures", 6),
    "step_figures": Section("gpu_figures", 35),
    "capture": Section("gpu_models", 25),
    "attention": Section("gpu_models", 40, "attention_kernels"),
    "model": Section("gpu_models", 35),
    "capture_figures": Section("gpu_figures", 45),
    "upload": Section("gpu_training", 7),
    "inference": Section("gpu_models", 10),
    "memory": Section("gpu_figures", 5),
    "two_processes": Section("gpu_training", 20),
    "end_to_end": Section("gpu_stream", 60),
}
"""In the order in which they run: 350 seconds in all."""


def run(names: list[str], setting: Setting) -> dict[str, Any]:
    """Run sections and print what each found; returns everything that was found."""
    everything: dict[str, Any] = {"checks": {}, "figures": {}}
    notes: dict[str, Any] = {}
    seconds = 0.0
    start = time.perf_counter()
    for done, name in enumerate(names, 1):
        seconds += SECTIONS[name].seconds
        began = time.perf_counter()
        found, failed = _run_section(name, setting, start + seconds - began, notes)
        line: dict[str, Any] = {"section": name, "checks": found.checks, "figures": found.figures}
        if failed is not None:
            line["failed"] = failed
            everything["checks"][name] = {"ok": False, "failed": failed}
        _print(line | {"seconds": round(time.perf_counter() - began, 2)})
        everything["checks"] |= {f"{name}: {check}": value for check, value in found.checks.items()}
        everything["figures"][name] = found.figures | {"seconds": round(time.perf_counter() - began, 2)}
        del found
        gc.collect()
        if failed is not None and names[done:] and not _alive(setting.device):
            _merge(everything, _in_another_process(names[done:], setting))
            break
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return everything | {"versions": _versions(), "device": _device_name(setting.device)}


def failures(everything: dict[str, Any]) -> list[str]:
    """Names of the checks that failed."""
    return [name for name, check in everything["checks"].items() if not check["ok"]]


def record(saved: Path, steps: Path = STEPS) -> int:
    """Add the step figures of a saved result to a file of MeasuredSteps, in the place of the same steps measured
    before; returns how many they are. Raises ValueError if the result has none."""
    figures = json.loads(saved.read_text())["figures"].get("step_figures", {}).get("steps", [])
    from mtc.training.backends import MeasuredStep  # here, like every part of mtc: `mtc.devices` reads MTC_PRETEND_GPU

    names = MeasuredStep._fields
    timed = [row for row in figures if not row["dead"] and "milliseconds" in row and row["device"] != "cpu"]
    rows = [{n: row[n] for n in names} for row in timed]
    if not rows:
        raise ValueError(f"{saved} has no times of steps: they need a GPU and the section step_figures")
    by_kind = {tuple(row[n] for n in names[:-1]): row for row in [*json.loads(steps.read_text()), *rows]}
    lines = [json.dumps(row) for _, row in sorted(by_kind.items())]
    steps.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return len(rows)


def _run_section(name: str, setting: Setting, seconds: float, notes: dict[str, Any]) -> tuple[Findings, str | None]:
    from benchmarks.gpu_checks import Findings  # here, because it imports mtc.devices, which reads MTC_PRETEND_GPU

    found = Findings(seconds, notes)
    section = SECTIONS[name]
    try:
        module = importlib.import_module(f"benchmarks.{section.module}")
        function: Callable[[Setting, Findings], None] = getattr(module, section.function or name)
        function(setting, found)
    except Exception as error:  # whatever it is, the other sections still have something to tell
        traceback.print_exc()
        return found, f"{type(error).__name__}: {error}"
    return found, None


def _alive(device: torch.device) -> bool:
    """Whether this process can still compute: after some errors of a kernel a GPU does nothing more for it."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


def _in_another_process(names: list[str], setting: Setting) -> dict[str, Any]:
    """The same program for these sections, whose lines are printed as they come, except the last, which is returned."""
    command = [sys.executable, "-m", "benchmarks.gpu", *(f"--only={name}" for name in names)]
    command += ["--small"] if setting.small else []
    last = "{}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            if number:
                print(last, end="", flush=True)
            last = line
    found: dict[str, Any] = json.loads(last)
    if "checks" not in found or "section" in found:  # it ended before its last line
        found = {"checks": {", ".join(names): {"ok": False, "failed": f"exit status {process.returncode}"}}}
    return found


def _merge(everything: dict[str, Any], more: dict[str, Any]) -> None:
    for part in ("checks", "figures"):
        everything[part] |= more.get(part, {})


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(_plain(line), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """As strict JSON has it: numbers of numpy and torch as Python's, and those that are not finite as text."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    """Of Python, CUDA and every distribution that this program has imported."""
    imported = {name.partition(".")[0] for name in sys.modules}
    of_module = importlib.metadata.packages_distributions()
    names = sorted({of_module[module][0] for module in imported - {"mtc"} if module in of_module})
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    return versions | {name: importlib.metadata.version(name) for name in names}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"no GPU: {platform.machine()} CPU in its place"


def _end(number: int, frame: object) -> None:
    """As an exception, so that a time-out removes what lies in main memory."""
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, metavar="SECTION", help="run only this one; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print the sections' names and seconds")
    parser.add_argument("--small", action="store_true", help="small shapes, as without a GPU")
    parser.add_argument("--require-gpu", action="store_true", help="end at once, with 2, if torch sees no GPU")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the last line's object there, indented")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add a saved file's step figures to --steps")
    parser.add_argument("--steps", type=Path, metavar="FILE", default=STEPS, help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.list:
        for name, section in SECTIONS.items():
            print(f"{name:16} {section.seconds:4.0f} s  benchmarks/{section.module}.py")
        return 0
    if options.record:
        try:
            print(f"{record(options.record, options.steps)} steps recorded in {options.steps}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--record {options.record}: {type(error).__name__}: {error}")
        return 0
    if options.save and (options.save.is_dir() or not os.access(options.save.resolve().parent, os.W_OK)):
        parser.error(f"--save {options.save}: no file can be written there")
    if not torch.cuda.is_available():
        seen = f"torch {torch.__version__} sees no GPU (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
        if options.require_gpu:
            parser.error(f"--require-gpu: {seen}")
        print(f"{seen}: the checks run on the CPU in its place, which proves nothing of a GPU", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="mtc-gpu-"))
        shared = Path("/dev/shm")
        room = shared.is_dir() and shutil.disk_usage(shared).free > MEMORY_BYTES
        memory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mtc-gpu-", dir=shared if room else scratch))
        everything = run(options.only or list(SECTIONS), _setting(options.small, scratch, memory))
    _print(everything)
    if options.save:
        options.save.write_text(json.dumps(_plain(everything), indent=1) + "\n")
    failed = failures(everything)
    for name in failed:
        print(f"FAILED {name}", file=sys.stderr)
    print(f"{everything['device']}: {len(everything['checks'])} checks, {len(failed)} failed", file=sys.stderr)
    return 1 if failed else 0


def _setting(small: bool, scratch: str, memory: str) -> Setting:
    """Where sections run. Sets what must be set before other modules are imported, for the processes that are started
    too."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["MTC_PRETEND_GPU"] = "1"
        torch.set_num_threads(1)  # of small shapes
    os.environ.setdefault("MTC_CACHE", os.path.join(scratch, "cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from benchmarks.gpu_checks import Setting

    return Setting(torch.device("cuda" if on_gpu else "cpu"), small or not on_gpu, scratch, memory)


if __name__ == "__main__":
    sys.exit(main())
