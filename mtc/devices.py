"""The device that a process computes on, and what only a GPU has: streams, pinned memory, work that goes on meanwhile.

MTC_PRETEND_GPU=1 runs everything that is written for a GPU on the CPU: the same branches, streams that do nothing.
It is for tests on machines without one, together with a Ray that believes in GPUs, and slower than what CPUs run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

PRETENDING = os.environ.get("MTC_PRETEND_GPU") == "1"
"""Whether the CPU is taken for a GPU."""


class DeviceError(RuntimeError):
    """The device that was asked for can't be used; the message says why."""


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
    """What torch calls the GPU, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
    """An event that happens when what is on `stream` now is done; `synchronize` waits for it, without using a core."""
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


def _module(device: torch.device) -> Any:
    return torch.cuda if device.type == "cuda" else torch.cpu
