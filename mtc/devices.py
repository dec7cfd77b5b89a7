"""The device that a process computes on, and what only a GPU has: streams, pinned memory, work that goes on meanwhile.

MTC_PRETEND_GPU=1 runs everything that is written for a GPU on the CPU: the same branches, streams that do nothing.
It is for tests on machines without one, together with a Ray that believes in GPUs, and slower than what CPUs run.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtc.errors import MtcError

PRETENDING = os.environ.get("MTC_PRETEND_GPU") == "1"
"""Whether the CPU is taken for a GPU, which MTC_PRETEND_GPU=1 asks for."""
MATRIX = 4096


class DeviceError(MtcError):
    """The device that was asked for can't be used; the message says why. Jobs ask all nodes before they start, so later
    it is a GPU that was lost, and another may do."""

    exit_code = 1
    event = "failed"


def open_device(name: str) -> torch.device:
    """The device of a process that was given `name`, "cpu" or "cuda": then the first GPU that it sees.

    Raises DeviceError if torch sees none.
    """
    if name != "cuda" or torch.cuda.is_available():
        return torch.device(name)
    if PRETENDING:
        return torch.device("cpu")
    if torch.version.cuda:
        build = f"is built for CUDA {torch.version.cuda}"
        advice = "`nvidia-smi` tells whether the driver is there and new enough for that"
    else:
        build = "is a build without CUDA"
        advice = "install one with CUDA (README, On a GPU)"
    raise DeviceError(
        f"this process was given a GPU, but torch {torch.__version__}, which {build}, sees none "
        f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}): {advice}; "
        "cluster.use_gpu=false runs on CPUs"
    )


def is_gpu(device: torch.device) -> bool:
    """Whether work on the device goes on while the host does something else, so that the host should not wait."""
    return device.type == "cuda" or PRETENDING


def device_name(device: torch.device) -> str:
    """Name of the GPU as torch gives it, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory that nobody holds; of another device's, which is not asked, infinity."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def side_stream(device: torch.device) -> Any:
    """A new stream of a GPU, beside the one that kernels are started on."""
    return _module(device).Stream(device) if device.type == "cuda" else torch.cpu.Stream()


def on_stream(stream: Any) -> Any:
    """A context in which kernels and copies are started on `stream`."""
    return torch.cpu.stream(stream) if isinstance(stream, torch.cpu.Stream) else torch.cuda.stream(stream)


def current_stream(device: torch.device) -> Any:
    """The stream that kernels are started on."""
    return _module(device).current_stream(device)


def record(stream: Any) -> Any:
    """An event that happens when the work that is on `stream` now is done; `synchronize` waits for it, without using a
    core."""
    event = torch.cpu.Event() if isinstance(stream, torch.cpu.Stream) else torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


def used_on(tensor: Tensor, stream: Any) -> None:
    """Keep the tensor's memory until `stream` is done with what it was given. Raises ValueError for memory that is not
    the GPU's, which the allocator does not know."""
    if tensor.is_cuda:
        tensor.record_stream(stream)
    elif not isinstance(stream, torch.cpu.Stream):
        raise ValueError(f"a tensor on {tensor.device} was used on a GPU's stream")


def pinned(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of the host from and to which a GPU copies by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`. To a GPU through pinned memory: from ordinary memory the copy would wait for all work."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronise(device: torch.device) -> None:
    """Wait for the work that was started on the device's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def choose_dtype(requested: str, device: torch.device | str) -> torch.dtype:
    """The dtype of `model.dtype`: `auto` is bfloat16 where the hardware multiplies it fast, else float32."""
    if requested != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a CPU without these units emulates bfloat16, a hundred times slower than float32
        probes = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
        fast = kind == "cpu" and any(probe() for probe in probes if probe)
    return torch.bfloat16 if fast else torch.float32


class Stopwatch:
    """Seconds of a piece of work on a device, read when it is known to be done."""

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        if self._events:
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        self._seconds = time.perf_counter() - start

    def seconds(self) -> float:
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def measure_device(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square matrix product, median of a few runs."""
    size = MATRIX if device.type == "cuda" else MATRIX // 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        watch = Stopwatch(device)
        with watch.running():
            product()
        return watch.seconds()

    times = [seconds(lambda: a @ b) for _ in range(7)]
    return 2 * size**3 / statistics.median(times[2:])


def choose_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether products run in bfloat16: `auto` says yes where the hardware multiplies it fast."""
    if precision != "auto":
        return precision == "bfloat16"
    return choose_dtype("auto", device) == torch.bfloat16


def _module(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch.cpu
