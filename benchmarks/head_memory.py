"""How much memory a head needs whose cluster trains: Ray's processes, the job's driver, and actors without a CPU.

    python -m benchmarks.head_memory [--preset NAME] [--set PART.FIELD VALUE ...]

A head without CPUs, as in k8s/base/raycluster.yaml, and a node that does the work are started on this machine, and the
job on the head. Processes of the head are those that inherited its mark; of each second the proportional set sizes
(PSS: a page that several share counts for each in part) are added up by what a process is. Shared memory of the object
store is counted in those that have looked at it. Printed are, for each kind, the largest of the seconds and, first, the
largest sum of a second.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

MARK = "MTC_BENCHMARK_NODE"
STORE_BYTES = 200_000_000


def kind_of(process: psutil.Process) -> str:
    """What a process is, by its command line."""
    line = " ".join(process.cmdline())
    for name in ("gcs_server", "jobs/train.py", "dashboard/dashboard.py", "dashboard/agent.py", "runtime_env/agent"):
        if name in line:
            return name
    for name in ("autoscaler", "log_monitor", "raylet/raylet"):
        if name in line:
            return name
    if ray := re.match(r"ray::(\w+)", line):
        return f"ray::{ray[1]}"
    return "multiprocessing of the dashboard" if "spawn_main" in line or "forkserver" in line else "others"


def sizes(mark: str) -> Counter[str]:
    """PSS by kind of the processes with a mark, in bytes."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found[kind_of(process)] += process.memory_full_info().pss
        except psutil.Error:
            continue  # somebody else's, or it ended while we looked
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def node(mark: str, directory: str, *options: str) -> Any:
    """One node of a cluster on this machine, until the end of the context."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--block", "--disable-usage-stats", f"--object-store-memory={STORE_BYTES}", *options]
    environment = os.environ | {MARK: mark, "RAY_AUTH_MODE": "disabled"}
    with open(f"{directory}/{mark.replace(' ', '-')}.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while "Ray runtime started" not in Path(log.name).read_text():
            if process.poll() is not None:
                raise RuntimeError(Path(log.name).read_text())
            time.sleep(0.2)
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("PART.FIELD", "VALUE"))
    arguments = parser.parse_args()
    most: Counter[str] = Counter()
    largest = 0
    with tempfile.TemporaryDirectory(prefix="head-memory-") as directory, ExitStack() as nodes:
        mark, port = f"head {os.getpid()}", free_port()
        head = ["--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={directory}/ray"]
        head += ["--node-ip-address=127.0.0.1", f"--dashboard-port={free_port()}"]
        nodes.enter_context(node(mark, directory, *head))
        nodes.enter_context(node(f"node {os.getpid()}", directory, f"--address=127.0.0.1:{port}", "--num-cpus=2"))
        print(f"Ray alone: {sum(sizes(mark).values()) / 1e9:.2f} GB")
        job = [sys.executable, "jobs/train.py", "--preset", arguments.preset, "--output.root", f"{directory}/runs"]
        job += [word for name, value in arguments.set for word in (f"--{name}", value)]
        environment = os.environ | {MARK: mark, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
        process = subprocess.Popen(job, env=environment)
        while process.poll() is None:
            now = sizes(mark)
            most |= now
            largest = max(largest, sum(now.values()))
            time.sleep(1.0)
    print(f"largest sum {largest / 1e9:.2f} GB; exit code {process.returncode}")
    for name, size in most.most_common():
        print(f"{size / 1e9:8.2f} GB  {name}")


if __name__ == "__main__":
    main()
