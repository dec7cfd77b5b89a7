"""One GPU for two processes at the same time: NVIDIA's Multi-Process Service (MPS).

Kernels of two processes on one GPU run by turns, a slice of time for each, unless both are clients of an MPS daemon:
then they run beside each other. The layout for one GPU puts a trainer and a model actor on it, so a run may have a
daemon of its own for as long as it lasts. Nobody else's daemon is touched, and none of the GPU's settings, such as its
compute mode or MIG.

The price: a fatal fault of one client is one of all clients, and by NVIDIA's documentation it is undefined what happens
to the others when one is killed in the middle of its kernels. `docs/cluster.md` says what that means for a run.

What is used of nvidia-cuda-mps-control(1), which comes with the driver: `-f`, a daemon that stays a child of this
process; and, without arguments, the commands get_server_list, get_server_status, start_server and quit on its standard
input.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

logger = logging.getLogger(__name__)

Process = subprocess.Popen[bytes]

PROGRAM = "nvidia-cuda-mps-control"
DEFAULT_PIPES = "/tmp/nvidia-mps"
"""Where CUDA looks for a daemon while CUDA_MPS_PIPE_DIRECTORY is not set."""
LONGEST_DIRECTORY = 80
"""Longest path, in bytes, of a daemon's directory; a socket in it has 107 for its own."""
ANSWER_S = 10.0
"""Seconds that a daemon may take to answer a command."""
START_S = 30.0
"""Seconds that a daemon and its server may take to start."""
QUIT_S = 5
"""Seconds that a daemon waits for its clients to end before it stops without."""
STOP_S = 20.0
"""Seconds that all of stopping may take before the daemon is killed."""

# Its standard input ends when this process closes it or dies, in whatever way: a daemon never outlives its run.
_STOPPER = 'cat >/dev/null; echo "quit -t $1" | timeout "$2" "$3"; rm -rf -- "$4"'


@contextmanager
def shared_gpu(wanted: bool) -> Iterator[dict[str, str]]:
    """A context in which processes with the environment that it gives share a GPU without taking turns.

    To be entered before those processes first use CUDA, and left when they have ended. A daemon of this user's or
    root's that answers where CUDA looks for one is used and left alone; otherwise one is started, and stopped at the
    end. Where MPS can't be had, the environment is empty and one line of the log says why.
    """
    with ExitStack() as stack:
        environment: dict[str, str] = {}
        if wanted:
            try:
                program = _program()
                environment = _running_daemon(program) or stack.enter_context(_own_daemon(program))
            except _Unavailable as error:
                logger.warning("processes on one GPU take turns, without MPS: %s", error)
        yield environment


class _Unavailable(Exception):
    """MPS can't be had; the message says why."""


def _program() -> str:
    program = shutil.which(PROGRAM)
    if program is None:
        raise _Unavailable(f"{PROGRAM}, which comes with NVIDIA's driver, is not on PATH")
    return program


def _running_daemon(program: str) -> dict[str, str]:
    """What clients need of a daemon that CUDA would find by itself, empty if there is none."""
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_PIPES
    environment = {"CUDA_MPS_PIPE_DIRECTORY": pipes}
    try:
        owner = os.stat(os.path.join(pipes, "control")).st_uid
    except OSError:
        return {}
    if owner not in (0, os.getuid()) or _servers(program, os.environ | environment) is None:
        return {}
    logger.info("processes on one GPU use the MPS daemon of %s", pipes)
    return environment


@contextmanager
def _own_daemon(program: str) -> Iterator[dict[str, str]]:
    """What clients need of a daemon that runs for as long as the context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _renumbers(visible):
        raise _Unavailable(
            f"with CUDA_VISIBLE_DEVICES={visible} it would number the GPUs anew; give UUIDs (nvidia-smi -L)"
        )
    directory = _private_directory()
    names = {"CUDA_MPS_PIPE_DIRECTORY": "pipes", "CUDA_MPS_LOG_DIRECTORY": "logs"}
    environment = {variable: os.path.join(directory, name) for variable, name in names.items()}
    processes: list[Process] = []
    try:
        try:
            _start(program, directory, environment, processes)
        except OSError as error:
            raise _Unavailable(f"{program} can't be started: {error}") from error
        logger.info("processes on one GPU use an MPS daemon of this run, in %s", directory)
        yield environment
    finally:
        _stop(processes)
        shutil.rmtree(directory, ignore_errors=True)


def _renumbers(visible: str | None) -> bool:
    """Whether a server that starts with this CUDA_VISIBLE_DEVICES numbers its GPUs differently from what it says: its
    clients count the server's GPUs, so those with the same value would ask for GPUs that are not there."""
    devices = visible.split(",") if visible else []
    return devices != [str(n) for n in range(len(devices))] and not all(d.startswith(("GPU-", "MIG-")) for d in devices)


def _private_directory() -> str:
    """A context with a new directory that no other user may read."""
    directory = tempfile.mkdtemp(prefix="mtc-mps-")
    if len(os.fsencode(directory)) <= LONGEST_DIRECTORY:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="mtc-mps-", dir="/tmp")


def _start(program: str, directory: str, environment: dict[str, str], processes: list[Process]) -> None:
    """Start the daemon and what stops it, which go into `processes`; return when a server computes for this user."""
    everything = os.environ | environment
    if not everything.get("CUDA_VISIBLE_DEVICES"):  # empty: this process has no GPU, unlike those that it starts
        everything.pop("CUDA_VISIBLE_DEVICES", None)
    for path in environment.values():
        os.mkdir(path, 0o700)
    # Both in sessions of their own: Ctrl-C in a terminal is for the clients first.
    with open(os.path.join(environment["CUDA_MPS_LOG_DIRECTORY"], "output"), "wb") as output:
        daemon = subprocess.Popen(
            [program, "-f"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=everything,
            start_new_session=True,
        )
    processes.append(daemon)
    stopper = subprocess.Popen(
        ["sh", "-c", _STOPPER, "sh", str(QUIT_S), str(STOP_S - QUIT_S), program, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=everything,
        start_new_session=True,
    )
    processes.append(stopper)
    _wait_for_server(program, daemon, everything)


def _wait_for_server(program: str, daemon: Process, environment: dict[str, str]) -> None:
    """Return when the daemon has a server that computes. It would start one for its first client only, which would fail
    where the GPU does not allow one."""
    deadline = time.monotonic() + START_S
    asked = False
    while daemon.poll() is None and time.monotonic() < deadline:
        servers = _servers(program, environment)
        if servers:
            state = (_ask(program, f"get_server_status {servers[-1]}", environment) or "").upper()
            busy = "INITIALIZING" in state or "FAULT" in state
            if not busy and servers[-1] in (_servers(program, environment) or []):
                return
        elif servers is not None and not asked:
            asked = _ask(program, f"start_server -uid {os.getuid()}", environment) is not None
        time.sleep(0.05)
    what = f"no server started within {START_S:g} s" if daemon.poll() is None else "the daemon ended"
    raise _Unavailable(f"{what}: {_last_words(environment['CUDA_MPS_LOG_DIRECTORY'])}")


def _servers(program: str, environment: dict[str, str]) -> list[str] | None:
    """Process ids of the daemon's servers, None if no daemon answers."""
    answer = _ask(program, "get_server_list", environment)
    return None if answer is None else [word for word in answer.split() if word.isdigit()]


def _ask(program: str, command: str, environment: dict[str, str]) -> str | None:
    """The daemon's answer to a command, None if there is no daemon or none that answers."""
    try:
        done = subprocess.run(
            [program], input=command + "\n", env=environment, capture_output=True, text=True, timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _last_words(logs: str) -> str:
    """The last line of the first log that has one: the server's, the daemon's, what the daemon printed."""
    for name in ("server.log", "control.log", "output"):
        path = os.path.join(logs, name)
        if os.path.exists(path):
            with open(path, errors="replace") as file:
                if lines := [line.strip() for line in file if line.strip()]:
                    return lines[-1]
    return "it left no word"


def _stop(processes: list[Process]) -> None:
    """End the processes that `_start` started: the daemon by its own command, or if it does not obey by force."""
    daemon, stopper = [*processes, None, None][:2]
    if stopper is not None and stopper.stdin is not None:
        stopper.stdin.close()
        _wait_or_kill(stopper, STOP_S)
    if daemon is not None:
        _wait_or_kill(daemon, 1)


def _wait_or_kill(process: Process, seconds: float) -> None:
    """Wait for the end of a process that leads a session; if it takes longer, kill it with what it started."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
