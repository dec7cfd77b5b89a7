"""Addresses at which no Ray cluster answers: each ends a job in seconds, with what is there and what to set."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest

import serve.app
from cluster.pipeline import connected
from mtc import joining
from mtc.joining import AddressError, ClusterUnreachable, check_address

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def http(body: bytes, status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, and that is all
        yield server.getsockname()[1]


@contextmanager
def closed() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@contextmanager
def other_grpc() -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (closed(), ClusterUnreachable, "nothing listens there"),
        (silent(), ClusterUnreachable, "something listens there, but does not answer as a Ray head does"),
        (
            http(b'{"ray_version": "2.60.0"}', 200),
            AddressError,
            "the dashboard of a Ray cluster answers there",
        ),
        (http(b"hello", 404), AddressError, "an HTTP server answers there, status 404"),
        (other_grpc(), AddressError, "another of Ray's ports than its head's, such as Ray Client's 10001"),
    ],
)
def test_what_answers_is_said(place, error, message, monkeypatch):
    monkeypatch.setattr(joining, "ANSWER_S", 1.0)
    with place as port, pytest.raises(error, match=rf"^RAY_ADDRESS=127\.0\.0\.1:{port}: {message}.*HOST:PORT"):
        check_address(f"127.0.0.1:{port}", "RAY_ADDRESS")


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("http://127.0.0.1:8265", AddressError, "a URL is no address of a cluster"),
        ("ray://127.0.0.1:10001", AddressError, "Ray Client is not supported"),
        ("nonsense", AddressError, "not HOST:PORT"),
        ("127.0.0.1:99999", AddressError, "not HOST:PORT"),
        ("two words:6379", AddressError, "not HOST:PORT"),
        ("a..b:6379", AddressError, "'a..b' is no name of a machine"),
        ("nowhere.invalid:6379", ClusterUnreachable, "no machine of the name nowhere.invalid"),
    ],
)
def test_what_can_be_no_address_is_refused(address, error, message, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(error, match=f"^RAY_ADDRESS={address}: {message}"), connected():
        pass
    monkeypatch.setattr(serve.app, "build", lambda settings: None)
    assert serve.app.main(["--run", "runs/latest"]) == error.exit_code
    assert serve.app.main(["--run", "runs/latest", "--address", address]) == error.exit_code
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"serve.app: RAY_ADDRESS={address}: ")
    assert said[1].startswith(f"serve.app: --address={address}: ")


def test_a_name_that_nobody_resolves_ends_the_look(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(joining, "LOOK_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: over.wait(60) and [])  # of a name server that is gone
    with pytest.raises(ClusterUnreachable, match=r"--address=head:6379: no answer within 0\.1 s"):
        check_address("head:6379", "--address")
    over.set()


def test_ray_that_never_lets_join_ends_the_process():
    code = "from mtc import joining; import threading; joining.JOIN_S = 0.1; joining.check_address = print\n"
    code += "with joining.joining('h:1', 'RAY_ADDRESS'): threading.Event().wait(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == ("failed: RAY_ADDRESS=h:1: the cluster did not let this process join within 0.1 s\n")


def test_a_dead_address_ends_the_job(tmp_path):
    with closed() as port:
        done = subprocess.run(
            [sys.executable, "jobs/train.py", "--preset", "tiny", "--output.root", str(tmp_path)],
            cwd=ROOT, env=os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert last.startswith(f"failed: RAY_ADDRESS=127.0.0.1:{port}: nothing listens there")
    assert not any("Traceback" in line for line in before)
