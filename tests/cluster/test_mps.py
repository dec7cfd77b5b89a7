"""MPS for processes that share a GPU, with a stand-in for NVIDIA's program: it keeps to the real one's interface in
what is used of it, a socket named `control` included, and writes down how it was called."""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cluster import mps
from cluster.mps import Process, shared_gpu

STAND_IN = """#!{python} -S
import json, os, socket, sys, time

mode = os.environ.get("STAND_IN", "")
with open(os.environ["STAND_IN_CALLS"], "a") as calls:
    print(json.dumps([sys.argv[1:], dict(os.environ), os.getpid()]), file=calls)
os.chdir(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/nonexistent"))  # relative, a socket's path may be of any length

if sys.argv[1:] == ["-f"]:
    if mode == "refused":
        sys.exit("Failed to create the control daemon: operation not permitted")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("control")
    listener.listen()
    with open("nvidia-cuda-mps-control.pid", "w") as file:
        print(os.getpid(), file=file)
    logs, servers, looks = os.environ["CUDA_MPS_LOG_DIRECTORY"], [], 0
    while True:
        connection, _ = listener.accept()
        command, *arguments = connection.makefile("r").readline().split()
        answer = ""
        if command == "get_server_list":
            answer = "".join(f"{{server}}\\n" for server in servers)
        elif command == "start_server" and arguments == ["-uid", str(os.getuid())]:
            if mode == "exclusive":
                with open(os.path.join(logs, "server.log"), "a") as file:
                    print("Startup\\nMPS server failed to start", file=file)
            else:
                servers.append(4711)
        elif command == "get_server_status" and arguments == [str(server) for server in servers]:
            looks += 1
            answer = "ACTIVE\\n" if looks > 2 else "INITIALIZING\\n"
        elif command == "quit" and mode == "deaf":
            answer = "no\\n"
        elif command == "quit":
            connection.sendall(b"Shutting down\\n")
            break
        else:
            answer = f"unknown command {{command}} {{arguments}}\\n"
        connection.sendall(answer.encode())
        connection.close()
elif not sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect("control")
        except OSError:
            sys.exit("Cannot find MPS control daemon process")
        connection.sendall(sys.stdin.read().encode())
        connection.shutdown(socket.SHUT_WR)
        print(connection.makefile("r").read(), end="")
else:
    sys.exit(f"unknown option {{sys.argv[1:]}}")
"""


class Call(NamedTuple):
    """One start of the program."""

    arguments: list[str]
    environment: dict[str, str]
    pid: int


class Program(NamedTuple):
    """The stand-in on PATH."""

    path: Path
    calls_file: Path
    temporary: Path
    """Where temporary directories are made."""

    def calls(self) -> list[Call]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [Call(*json.loads(line)) for line in lines]

    def daemons(self) -> list[Call]:
        return [call for call in self.calls() if call.arguments == ["-f"]]

    def left(self) -> list[str]:
        """Temporary directories that are still there."""
        return os.listdir(self.temporary)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    path = tmp_path / "bin" / "nvidia-cuda-mps-control"
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="mtc-test-") as temporary:  # tmp_path is too long for sockets
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(mps, "DEFAULT_PIPES", str(tmp_path / "nvidia-mps"))
        monkeypatch.setattr(mps, "START_S", 20.0)
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        started = Program(path, tmp_path / "calls", Path(temporary))
        yield started
        alive = [call.pid for call in started.daemons() if runs(call.pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert alive == []
        assert started.left() == []


def runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@contextmanager
def running(program: Program, pipes: Path) -> Iterator[Process]:
    """Somebody else's daemon in `pipes`, which answers."""
    pipes.mkdir(exist_ok=True)
    environment = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(pipes)}
    ask = partial(subprocess.run, [program.path], input=b"get_server_list\n", env=environment, capture_output=True)
    daemon = subprocess.Popen([program.path, "-f"], env=environment)
    try:
        while ask().returncode:
            assert daemon.poll() is None
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    for record in caplog.records:  # why not is told to everybody
        assert record.levelno == (logging.WARNING if "take turns" in record.getMessage() else logging.INFO)
    return [record.getMessage() for record in caplog.records if record.name == "cluster.mps"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="cluster.mps")
    return caplog


def test_a_daemon_of_its_own(program: Program, log: pytest.LogCaptureFixture) -> None:
    with shared_gpu(True) as environment:
        (daemon,) = program.daemons()
        assert runs(daemon.pid)
        assert set(environment) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
        assert environment.items() <= daemon.environment.items()
        pipes = Path(environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert (pipes / "control").is_socket() and len(str(pipes / "control_privileged")) <= 107
        assert pipes.parent.parent == program.temporary and pipes.parent.stat().st_mode & 0o777 == 0o700
        said = subprocess.run(
            [program.path], input="get_server_list\n", env=os.environ | environment, capture_output=True, text=True
        )
        assert said.stdout == "4711\n", "a server is there before the first client, and one only"
        assert os.getsid(daemon.pid) == daemon.pid, "Ctrl-C does not reach it"
    assert not runs(daemon.pid)
    (message,) = messages(log)
    assert message == f"processes on one GPU use an MPS daemon of this run, in {pipes.parent}"


def test_not_wanted(program: Program, log: pytest.LogCaptureFixture) -> None:
    with shared_gpu(False) as environment:
        assert environment == {}
    assert program.calls() == [] and messages(log) == []


@pytest.mark.parametrize("known_by", ["variable", "place"])
def test_a_running_daemon_is_used_and_left_alone(
    known_by: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    pipes = tmp_path / "others" if known_by == "variable" else Path(mps.DEFAULT_PIPES)
    with running(program, pipes) as daemon:
        if known_by == "variable":
            monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(pipes))
        with shared_gpu(True) as environment:
            assert environment == {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}
            assert program.left() == []
        assert daemon.poll() is None and len(program.daemons()) == 1
        assert messages(log) == [f"processes on one GPU use the MPS daemon of {pipes}"]


@pytest.mark.skipif(os.getuid() != 0, reason="gives a socket to another user")
def test_another_users_daemon_is_not_used(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(program, Path(mps.DEFAULT_PIPES)) as daemon:
        os.chown(Path(mps.DEFAULT_PIPES) / "control", 12345, 12345)
        with shared_gpu(True) as environment:
            assert environment["CUDA_MPS_PIPE_DIRECTORY"].startswith(str(program.temporary))
            assert len(program.daemons()) == 2
        assert daemon.poll() is None


def test_a_dead_daemons_socket_does_not_matter(program: Program) -> None:
    pipes = Path(mps.DEFAULT_PIPES)
    with running(program, pipes):
        pass
    assert (pipes / "control").is_socket()
    with shared_gpu(True) as environment:
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] != str(pipes)


def test_without_the_program(program: Program, log: pytest.LogCaptureFixture) -> None:
    program.path.unlink()
    with shared_gpu(True) as environment:
        assert environment == {}
    (message,) = messages(log)
    assert "without MPS: nvidia-cuda-mps-control, which comes with NVIDIA's driver, is not on PATH" in message


def test_a_program_that_cannot_be_run(program: Program, log: pytest.LogCaptureFixture) -> None:
    program.path.write_text("#!/nonexistent/interpreter\n")
    with shared_gpu(True) as environment:
        assert environment == {}
    (message,) = messages(log)
    assert "can't be started: [Errno 2]" in message


def test_a_start_that_fails(program: Program, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("STAND_IN", "refused")
    with shared_gpu(True) as environment:
        assert environment == {} and program.left() == []
    (message,) = messages(log)
    assert message.endswith("the daemon ended: Failed to create the control daemon: operation not permitted")


def test_a_gpu_that_allows_no_server(
    program: Program, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """The daemon runs, but every client of it would fail."""
    monkeypatch.setenv("STAND_IN", "exclusive")
    monkeypatch.setattr(mps, "START_S", 1.0)
    with shared_gpu(True) as environment:
        (daemon,) = program.daemons()
        assert environment == {} and not runs(daemon.pid) and program.left() == []
    (message,) = messages(log)
    assert message.endswith("no server started within 1 s: MPS server failed to start")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_an_exception_inside_stops_it(error: type[BaseException], program: Program) -> None:
    with pytest.raises(error, match="inside"), shared_gpu(True):
        raise error("inside")
    (daemon,) = program.daemons()
    assert not runs(daemon.pid) and program.left() == []


def test_ctrl_c_while_it_starts(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mps, "_wait_for_server", interrupted)
    with pytest.raises(KeyboardInterrupt), shared_gpu(True):
        pytest.fail("it was interrupted before")
    assert program.left() == []


def test_a_daemon_that_does_not_obey_is_killed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "deaf")
    with shared_gpu(True) as environment:
        assert environment
        (daemon,) = program.daemons()
    assert not runs(daemon.pid)


def test_a_killed_run_leaves_no_daemon(program: Program) -> None:
    """SIGKILL, after which this process does nothing any more."""
    code = (
        "import os, signal, tempfile; from cluster import mps\n"
        f"mps.DEFAULT_PIPES, tempfile.tempdir = {mps.DEFAULT_PIPES!r}, {str(program.temporary)!r}\n"
        "with mps.shared_gpu(True) as environment:\n"
        "    print(environment['CUDA_MPS_PIPE_DIRECTORY'], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert run.stdout is not None and run.stdout.readline().startswith(str(program.temporary))
    run.stdout.close()
    assert run.wait(30) == -signal.SIGKILL
    (daemon,) = program.daemons()
    for _ in range(3000):  # its shell removes the directory once it has told the daemon to end
        if not program.left() and not runs(daemon.pid):
            break
        select.select([], [], [], 0.01)
    assert not runs(daemon.pid) and program.left() == []


@pytest.mark.parametrize("name", ["with spaces and 'quotes'", "x" * 120])
def test_other_temporary_directories(name: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = program.temporary / name
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with shared_gpu(True) as environment:
        pipes = environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert pipes.startswith("/tmp/mtc-mps-" if len(name) > 100 else str(directory))
    assert not Path(pipes).parent.exists() and os.listdir(directory) == []
    directory.rmdir()


@pytest.mark.parametrize(
    ("visible", "passed"),
    [("", None), ("0", "0"), ("0,1", "0,1"), ("GPU-8f2c,GPU-11aa", "GPU-8f2c,GPU-11aa"), ("MIG-3", "MIG-3")],
)
def test_gpus_that_both_sides_number_alike(
    visible: str, passed: str | None, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with shared_gpu(True) as environment:
        assert environment
        assert program.daemons()[0].environment.get("CUDA_VISIBLE_DEVICES") == passed


@pytest.mark.parametrize("visible", ["1", "1,0", "0,2", "GPU-8f2c,1"])
def test_gpus_that_a_server_would_number_anew(
    visible: str, program: Program, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with shared_gpu(True) as environment:
        assert environment == {}
    assert program.calls() == []
    (message,) = messages(log)
    assert f"CUDA_VISIBLE_DEVICES={visible}" in message and "nvidia-smi -L" in message
