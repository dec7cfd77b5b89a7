"""The CPU loops of kernels.c, compiled once per machine where there is a C compiler.

No compiler is needed: `load()` then returns None, `status()` says why, which the run records, and products.py uses
torch. The library takes raw pointers, so it does not depend on torch's version; it shares torch's OpenMP threads.
Images without a compiler bring a library that `python -m mtc.transcoder.native FILE --march x86-64-v3` made, and name
it in MTC_NATIVE.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from mtc import devices
from mtc.storage import cache_directory

# Sums may be reordered into vectors. -ffast-math itself would also switch denormals off in the whole process.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
         "-fopenmp", "-shared", "-fPIC"]  # fmt: skip
LEVELS = {"x86-64-v2": ("sse4_2", "popcnt"), "x86-64-v3": ("avx2", "fma", "bmi2"), "x86-64-v4": ("avx512f", "avx512vl")}
"""Flags of /proc/cpuinfo that a processor must have, for each value of -march."""


def load() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be built or MTC_NATIVE=0 turns them off."""
    return _build()[0]


def status() -> str:
    """How this process computes the sparse products on a CPU: "compiled" or "torch (reason)"."""
    return _build()[1]


def runs(tensor: Tensor) -> bool:
    """Whether the compiled loops take this tensor: float32 on a CPU, where they are compiled."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or devices.PRETENDING:
        return False
    return load() is not None


def call(name: str, *arguments: Tensor | float | bool) -> None:
    """Run a loop: tensors go as pointers, ints as int64, floats as float32; torch's thread count comes last.

    Tensors must be contiguous and on the CPU; all but indices are float32. Raises ValueError for others, RuntimeError
    where the loops are not compiled.
    """
    library = load()
    if library is None:
        raise RuntimeError(f"{name}: the loops are not compiled here: {status()}")
    converted = [_argument(value) for value in arguments]
    getattr(library, name)(*converted, ctypes.c_int(torch.get_num_threads()))


def build(library: Path, march: str) -> None:
    """Compile the loops for any processor of a kind, with a note beside the library of what that needs.

    Raises ValueError for a kind that is not in LEVELS, CalledProcessError if the compiler fails.
    """
    if march not in LEVELS:
        raise ValueError(f"--march {march}: one of {', '.join(LEVELS)} is wanted")
    flags = [f"-march={march}" if flag == "-march=native" else flag for flag in FLAGS]
    with resources.as_file(resources.files("mtc.transcoder") / "kernels.c") as source:
        subprocess.run([os.environ.get("CC", "cc"), *flags, str(source), "-o", str(library)], check=True, timeout=120)
    library.with_suffix(".json").write_text(json.dumps({"march": march, "flags": LEVELS[march]}))


def _argument(value: Tensor | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(value, Tensor):
        if not (value.is_contiguous() and value.device.type == "cpu" and value.dtype in (torch.float32, torch.int64)):
            raise ValueError(
                f"the loops take contiguous float32 and int64 on the CPU, not {value.dtype} of shape "
                f"{list(value.shape)} and strides {list(value.stride())} on {value.device}"
            )
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def _build() -> tuple[ctypes.CDLL | None, str]:
    wanted = os.environ.get("MTC_NATIVE", "")
    if wanted == "0":
        return None, "torch (MTC_NATIVE=0)"
    if wanted:
        return _prebuilt(Path(wanted))
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, "torch (no C compiler)"
    try:
        return ctypes.CDLL(str(_compile(compiler))), "compiled"
    except subprocess.CalledProcessError as error:
        return None, f"torch (compilation failed: {error.stderr.decode(errors='replace').strip()[-200:]})"
    except subprocess.TimeoutExpired as error:
        return None, f"torch (compilation took more than {error.timeout:.0f} s)"
    except OSError as error:
        return None, f"torch ({error})"


def _prebuilt(library: Path) -> tuple[ctypes.CDLL | None, str]:
    """A library made elsewhere, unless this processor lacks what it was made for."""
    try:
        needed = set(json.loads(library.with_suffix(".json").read_text())["flags"])
        missing = needed - set(_flags())
        if missing:
            return None, f"torch ({library} needs {', '.join(sorted(missing))})"
        return ctypes.CDLL(str(library)), "compiled"
    except (OSError, ValueError, KeyError) as error:
        return None, f"torch (MTC_NATIVE={library}: {error})"


def _flags() -> list[str]:
    """Flags of this processor, as in /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []


def _compile(compiler: str) -> Path:
    source = (resources.files("mtc.transcoder") / "kernels.c").read_bytes()
    key = hashlib.sha256(b"\0".join([source, " ".join([compiler, *FLAGS]).encode(), _processor()])).hexdigest()[:16]
    directory = Path(cache_directory()) / "native"
    library = directory / f"kernels-{key}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        file, built = Path(scratch) / "kernels.c", Path(scratch) / "kernels.so"
        file.write_bytes(source)
        subprocess.run([compiler, *FLAGS, str(file), "-o", str(built)], check=True, capture_output=True, timeout=120)
        built.replace(library)  # several processes may build at once; each ends with a whole file
    return library


def _processor() -> bytes:
    """This processor as -march=native depends on it: a cache directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
    wanted = ("model name", "flags", "Features", "CPU part", "model\t", "cpu family")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m mtc.transcoder.native", description="Compile the CPU loops for an image."
    )
    parser.add_argument("library", type=Path, help="the .so file to make")
    parser.add_argument("--march", default="x86-64-v3", help="kind of processor (%(default)s)")
    options = parser.parse_args()
    build(options.library, options.march)
