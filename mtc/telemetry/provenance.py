"""Where figures come from: the code's revision, the packages and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "ray", "numpy", "scipy", "pyarrow", "mtc")

GIT_SECONDS = 10.0
"""Longest wait for git, on a checkout that may lie on a network file system."""


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that figures depend on, and of Python."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def git_revision() -> str | None:
    """Commit of this code, with `-dirty` behind it if tracked files differ; `$MTC_GIT_REVISION` where that is set, as
    in images and submitted jobs, which carry no repository. None if it cannot be known."""
    named = os.environ.get("MTC_GIT_REVISION")
    if named:
        return named
    here = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
            ).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (FileNotFoundError, subprocess.SubprocessError):
        return None
    return answers[0].strip() + "-dirty" * bool(answers[1].strip())


def describe_machine() -> str:
    """This machine: processor, CPUs that this process may use, memory in GiB, GPUs that it sees."""
    import torch

    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    text = f"{processor}, {len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB"
    return ", ".join([text, *(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))])
