"""A real Ray head, the job as a user runs it, and SIGKILL for any of their processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster.local_ray import make_temporary_directory

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "model actor": "ray::MapWorker(MapBatches(CaptureActor))",
    "trainer": "ray::RayTrainWorker",
    "split coordinator": "ray::SplitCoordinator",
    "dataset manager": "ray::DatasetManager",
    "train controller": "ray::TrainController",
    "metrics log": "ray::MetricsLog",
}
OTHERS = {
    "analysis actor": "ray::MapWorker(MapBatches(FeatureActor))",
    "placement group cleaner": "ray::PlacementGroupCleaner",
}
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # else Ray makes one up for the head


def wait_for(what: str, ready: Callable[[], Any], seconds: float = 180.0) -> Any:
    """`ready()` once it is true; raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (answer := ready()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.05)
    return answer


class Head:
    """A head of its own directory and ports, with its processes."""

    def __init__(self, address: str, session: int):
        self.address = address
        self._session = session

    def processes(self, kind: str) -> list[psutil.Process]:
        """The living ones of a kind in TITLES or OTHERS."""
        found, title = [], (TITLES | OTHERS)[kind]
        for process in psutil.process_iter():
            try:
                command = process.cmdline() if os.getsid(process.pid) == self._session else []
                if command and command[0].startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue  # it ended while we looked
        return found

    def kill(self, kind: str, which: int = 0) -> int:
        """SIGKILL one of a kind; waits until there is one. Returns its pid."""
        victims = wait_for(f"a {kind}", lambda: self.processes(kind))
        victim = victims[which % len(victims)]
        victim.kill()
        return int(victim.pid)


@contextmanager
def ray_head(cpus: float = 2, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """`ray start --head --block` in a session of its own, which is how its processes are told from others."""
    port, directory = _free_port(), make_temporary_directory()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus", str(cpus), "--object-store-memory", "200000000", f"--dashboard-port={_free_port()}"]
    command += ["--temp-dir", directory, "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]
    with Path(directory, "head.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | NO_TOKEN | (environment or {})
        )
    try:
        started = Path(directory, "head.log")
        wait_for("Ray's start", lambda: "Ray runtime started" in started.read_text(), 60)
        yield Head(f"127.0.0.1:{port}", process.pid)
    finally:
        for found in psutil.process_iter():
            try:
                if os.getsid(found.pid) == process.pid:
                    found.kill()
            except (psutil.Error, ProcessLookupError):
                continue
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """`python jobs/train.py`, started again with the same command when it was killed."""

    def __init__(self, head: Head, root: Path, run_id: str, options: Sequence[str], environment: Any = None):
        self.run = root / run_id
        self.command = [sys.executable, "jobs/train.py", "--output.root", str(root), "--output.run_id", run_id]
        self.command += options
        self.environment = os.environ | NO_TOKEN | {"RAY_ADDRESS": head.address} | (environment or {})
        self.lines: list[str] = []
        self.starts = 0
        self.step = 0
        """The newest that was shown."""
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.starts += 1
        self.moment = time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        return "".join(self.lines)

    def newest(self) -> int:
        """Steps of the newest completed checkpoint."""
        return self._newest()[0]

    def _newest(self) -> tuple[int, str]:
        """Its steps, and which start of the trainers wrote it."""
        found = (path.parent.name.split("-") for path in (self.run / "checkpoints").glob("step-*/checkpoint.json"))
        return max(((int(words[1]), words[2]) for words in found), default=(0, ""))

    def wait_for_restart(self, before: str, seconds: float = 240.0) -> int:
        """Steps of the first checkpoint of another start of the trainers than `before`, see `trainers_start`."""

        def ready() -> int | None:
            if not self.running:
                raise AssertionError(f"the job ended with {self.process.returncode}:\n{self.output()[-6000:]}")
            step, start = self._newest()
            return step if start != before else None

        try:
            return int(wait_for("a checkpoint of another start", ready, seconds))
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.output()[-6000:]}") from None

    def trainers_start(self) -> str:
        """Which start of the trainers wrote the newest checkpoint."""
        return self._newest()[1]

    def wait_for_checkpoint(self, beyond: int, seconds: float = 240.0) -> int:
        """Steps of the first checkpoint of more than `beyond` steps; raises if the job ends before."""

        def ready() -> int | None:
            if not self.running:
                raise AssertionError(f"the job ended with {self.process.returncode}:\n{self.output()[-6000:]}")
            return newest if (newest := self.newest()) > beyond else None

        try:
            return int(wait_for(f"a checkpoint beyond step {beyond}", ready, seconds))
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.output()[-6000:]}") from None

    def finish(self, seconds: float = 600.0) -> None:
        """Wait for the end; raises unless it is a good one."""
        self.process.wait(seconds)
        self._reader.join(10)
        assert self.process.returncode == 0, self.output()[-8000:]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def events(self) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
