"""One machine from nothing to an answer: a local Ray head of its own, the main job, the service, one request.

    python -m jobs.quickstart run [--preset smollm2-135m] [--run-id ID] [-- OVERRIDES]   what `make quickstart` does
    python -m jobs.quickstart serve --run RUN                                            what `make serve` does
    python -m jobs.quickstart stop                                                       what `make stop` does

Dashboard and service listen on the loopback interface only, on ports that were free; `.quickstart/head.json` says
which.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.local_ray import check_installation, make_temporary_directory
from jobs.command_line import parse_command_line, run_program
from mtc.errors import MtcError
from mtc.programs import described
from mtc.storage import (
    RunDirectory,
    absolute,
    check_writable,
    named_run,
    open_run,
    prepare_environment,
    read_features,
    require_one_layer,
)
from mtc.telemetry import git_revision
from serve.contract import ENVIRONMENT, free_ports, proxy_files

SOURCE = Path(__file__).resolve().parent.parent
IN_TREE = (SOURCE / "pyproject.toml").is_file()
ROOT = SOURCE if IN_TREE else Path.cwd()
"""Where runs and the head's state lie: the checkout or, installed from a wheel, where the command is given."""
STATE = ROOT / ".quickstart" / "head.json"
SENTENCE = "The Congress of the United States shall have power to lay and collect taxes."
OBJECT_STORE_BYTES = 1_000_000_000
RAY_LINE = re.compile(r"\s(INFO|SUCC|WARNING) [a-z_]+\.py:\d+ -- |has constructor arguments in the object store")
"""What Ray's own command says about the job that it submits, and its core of every pool of actors that Ray Data starts:
nobody can act on that."""
MARK = "MTC_QUICKSTART_HEAD"
"""In the environment of all processes of a head: its token and whose it is (`_mark`)."""
OWNER = "mtc-owner"
"""The same, in the head's temporary directory."""
START_S = 120.0
"""Longest wait for a head to start, and for a service to be ready, seconds."""
STARTS = 3
"""How often a head is started whose processes do not get ready in the 30 s that Ray gives them: on a busy machine they
may be the next time."""
STARTED, TOO_SLOW = b"Ray runtime started.", b"timed out during startup"
"""What `ray start` says of its node when it is ready, and when it is not in time."""
STOP_S = 30.0
"""After which processes that were asked to end are killed."""


class QuickstartError(RuntimeError):
    """A step failed; the message says which and where its log is."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, analyse, serve, ask")
    run.add_argument("--preset", default="smollm2-135m")
    run.add_argument("--root", default=str(ROOT / "runs"), type=absolute, help="directory of run directories")
    run.add_argument(
        "--run-id", help="the run's name; that of an unfinished one continues it (default: preset and time)"
    )
    run.add_argument("overrides", nargs="*", help="options of jobs/train.py, after --")
    serve = commands.add_parser("serve", help="serve a finished run")
    serve.add_argument("--run", required=True)
    commands.add_parser("stop", help="stop the head and all that runs on it")
    try:
        arguments = parser.parse_args(argv)
        if arguments.command != "stop":
            prepare_environment()
        if arguments.command == "stop":
            print("stopped" if stop_head() else "nothing was running")
        elif arguments.command == "serve":
            check_servable(arguments.run)  # a mistake starts nothing
            print_usage(serve_run(start_head(), arguments.run), arguments.run)
        else:
            quickstart(arguments.preset, arguments.root, arguments.run_id, arguments.overrides)
    except (QuickstartError, MtcError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        stop_head()
        print("\ninterrupted: the local Ray head was stopped, nothing was published", file=sys.stderr)
        return 130
    return 0


def quickstart(preset: str, root: str, run_id: str | None, overrides: list[str]) -> None:
    if any(word.startswith(("--output.root", "--output.run_id")) for word in overrides):
        raise QuickstartError("--output.root and --output.run_id are --root and --run-id here")
    named = ["--output.run_id", run_id] if run_id else []
    parse_command_line(["--preset", preset, "--output.root", root, *named, *overrides], "")  # a mistake starts nothing
    check_writable(f"--root {root}", root)
    head, now = start_head(), datetime.now(UTC)
    # Ray runs no job again under a name that it has had.
    submission = f"{run_id}-{now:%H%M%S}" if run_id else f"{preset}-{now:%Y%m%d-%H%M%S}"
    run_id = run_id or submission
    arguments = ["--preset", preset, "--output.root", root, "--output.run_id", run_id]
    arguments += ["--cluster.metrics_port", str(head["metrics_port"]), *overrides]
    submit_job(head, submission, arguments)
    run = RunDirectory(f"{root.rstrip('/')}/{run_id}")
    config, members = run.config(), run.members()
    lowest = min(config.members(), key=lambda member: member.config.model.layer)  # answers where none is named
    answering = next(iter(members.values())) if config.sweep else members[lowest.name]
    served = answering.url if config.sweep else run.url
    base = serve_run(head, served)
    print_answer(ask(base, SENTENCE), *about_features(answering.url))
    print_usage(base, served)
    if config.sweep:
        serve = "make serve RUN=" if IN_TREE else "mtc quickstart serve --run "
        others = ", ".join(serve + own.url for own in list(members.values())[1:])
        print(f"sweep      {served} is served, the first of sweep; others: {others}")
        print(f"           {run.location('report/sweep_report.html')} compares them")
    elif len(members) > 1:
        layers = ", ".join(str(layer) for layer in sorted(sites.layer for sites in config.model.sites))
        print(f"layers     {layers} are served as one; a request names one by `layer`, else layer", end=" ")
        print(f"{lowest.config.model.layer} answers; {run.location('report/layers_report.html')} compares them")


def check_servable(url: str) -> None:
    """Raises RunError for what is no finished run, and for a sweep, whose transcoders answer each for itself."""
    run = open_run(url, verify=False)
    if run.config().sweep:
        require_one_layer(run)


def start_head() -> dict[str, Any]:
    """The running head of this checkout, or a new one."""
    if known := _known_head():
        if _runs(known):
            return known
        stop_head()
    check_installation()
    check_writable(f"the head's state in {STATE.parent}", str(STATE.parent))
    STATE.parent.mkdir(exist_ok=True)
    for _ in range(STARTS):
        if head := _new_head():
            return head
    raise QuickstartError(f"the Ray head's processes were not ready in Ray's 30 s, {STARTS} times; see {_log()}")


def _new_head() -> dict[str, Any] | None:
    """A head whose node is ready; None if its processes were too slow for Ray. They are ended then, as they are before
    a QuickstartError is raised."""
    port, dashboard, agent, client, metrics, job_metrics = _free_ports(6)
    temporary = make_temporary_directory()
    command = [_tool("ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}", f"--temp-dir={temporary}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    print(f"starting a local Ray head (log: {_log()})", flush=True)
    head: dict[str, Any] = {"token": secrets.token_hex(16), "temporary": temporary, "address": f"127.0.0.1:{port}"}
    head |= {"dashboard": f"http://127.0.0.1:{dashboard}", "http_port": _free_ports(1, first=8000)[0]}
    head |= {"metrics_port": job_metrics}
    Path(temporary, OWNER).write_text(_mark(head))
    environment = _environment() | free_ports() | proxy_files(temporary) | {MARK: _mark(head)}
    _remember(head)  # before it runs: whatever happens, `stop` knows what to look for
    with _log().open("wb") as output:
        process = subprocess.Popen(
            command, cwd=STATE.parent, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    # The dashboard answers before there is a node, and also where there will be none.
    while (session := _session(head)) is None or STARTED not in _log().read_bytes():
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            stop_head()
            if ended and TOO_SLOW in _log().read_bytes():
                return None
            raise QuickstartError(f"the Ray head did not start within {START_S:g} s; see {_log()}")
        time.sleep(0.5)
    _remember(head := head | {"session": session})
    return head


def scrape_config(head: dict[str, Any]) -> dict[str, Any]:
    """What Prometheus needs to know of a head: the job, the service, and Ray's agents with what each process says."""
    places = {"mtc-job": head["metrics_port"], "mtc-service": head["http_port"]}
    scraped: list[dict[str, Any]] = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for name, port in places.items()
    ]
    found = {"files": [f"{head['temporary']}/prom_metrics_service_discovery.json"]}
    # An agent takes most of a second to put all of Ray's series together, so it is asked less often.
    scraped.append({"job_name": "ray", "file_sd_configs": [found], "scrape_interval": "10s"})
    # Half a minute of training should show too.
    return {
        "global": {"scrape_interval": "2s", "evaluation_interval": "10s"},
        "rule_files": [str(SOURCE / "k8s" / "monitoring" / "rules.yaml")] if IN_TREE else [],
        "scrape_configs": scraped,
    }


def stop_head() -> bool:
    """Stop the head of this checkout and everything on it; true if there was one."""
    if (head := _known_head()) is None:
        return False
    running = found = _processes(head)
    deadline = time.monotonic() + STOP_S
    while running:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate() if time.monotonic() < deadline else process.kill()
        psutil.wait_procs(running, timeout=5)
        running = _processes(head)  # what they started meanwhile
    shutil.rmtree(head["temporary"], ignore_errors=True)
    _forget()
    return bool(found)


def submit_job(head: dict[str, Any], name: str, arguments: list[str]) -> None:
    """`ray job submit --working-dir . -- python jobs/train.py ...`, following its output."""
    command = [_tool("ray"), "job", "submit", "--address", head["dashboard"], "--submission-id", name]
    # Installed, every process of this machine has the code; a working directory would be copied for nothing.
    command += ["--working-dir", ".", "--", "python", "jobs/train.py"] if IN_TREE else ["--", "mtc", "train"]
    command += arguments
    print("$ " + " ".join(["ray", *command[1:]]), flush=True)
    verbose = "--verbose" in arguments
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=None if verbose else subprocess.PIPE, text=True,
        stderr=None if verbose else subprocess.STDOUT,
    )  # fmt: skip
    try:
        for line in process.stdout or ():
            if not RAY_LINE.search(line):
                print(line, end="", flush=True)
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code:
        raise QuickstartError(f"the job {name} failed with exit code {code}; its output is above")


def serve_run(head: dict[str, Any], run: str) -> str:
    """Deploy the Serve application on a finished run; returns its base URL once that run answers there."""
    wanted = open_run(run, verify=False).run_id
    if not _runs(head):  # a job may have taken hours
        raise QuickstartError("the Ray head of this checkout is gone; the same command starts another one")
    if "serves" not in head:  # until now anybody could take the port
        _remember(head := head | {"http_port": _free_ports(1, first=head["http_port"])[0], "serves": True})
    # On this machine alone: whoever reaches it may write beside the run.
    command = [sys.executable, "-m", "serve.app", "--run", absolute(run), "--notes"]
    command += ["--address", head["address"], "--port", str(head["http_port"])]
    if code := subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode:
        raise QuickstartError("the service could not be deployed; its output is above", code)
    base = f"http://127.0.0.1:{head['http_port']}"
    deadline = time.monotonic() + START_S
    while not _answers(f"{base}/readyz"):
        if time.monotonic() > deadline:
            raise QuickstartError(f"{base}/readyz is not ready after {START_S:g} s")
        time.sleep(0.5)
    found = httpx.get(f"{base}/info", timeout=60).raise_for_status().json()["model"]["run_id"]
    if found != wanted:
        raise QuickstartError(f"{base} answers with the run {found}, not with {wanted}")
    return base


def ask(base: str, text: str, top_k: int = 5) -> dict[str, Any]:
    answer = httpx.post(f"{base}/encode", json={"inputs": text, "top_k": top_k}, timeout=60).raise_for_status()
    return dict(answer.json())


def about_features(run: str) -> tuple[dict[int, str | None], set[int]]:
    """The labels of features, None of those without samples; and the features of massive tokens."""
    rows = read_features(RunDirectory(run), ["feature", "label", "massive"]).to_pylist()
    return {row["feature"]: row["label"] for row in rows}, {row["feature"] for row in rows if row["massive"]}


def print_answer(answer: dict[str, Any], labels: dict[int, str | None], massive: set[int]) -> None:
    """Per token its strongest features, those of massive tokens last, and their labels."""
    print(f'\nPOST /encode {{"inputs": "{SENTENCE}"}}\n\n{"token":>14}  strongest features (activation): their labels')
    result = answer["results"][0]
    for token, special, strongest in zip(result["tokens"], result["is_special"], result["features"], strict=True):
        if special:
            continue
        features = []
        for feature in sorted(strongest, key=lambda f: f["feature_index"] in massive)[:2]:
            index = feature["feature_index"]
            kind = ", of massive tokens" if index in massive else ""
            features.append(f"#{index} ({feature['activation_value']:.2f}{kind}): {labels[index] or 'no samples'}")
        print(f"{token!r:>14}  " + f"\n{'':>16}".join(features))


def print_usage(base: str, run: str) -> None:
    stop = "make stop" if IN_TREE else "mtc quickstart stop"
    print(f"\nserved at  {base}   (stop with: {stop})")
    example = f'{base}/encode -H "Content-Type: application/json" -d \'{{"inputs": "We the people"}}\''
    print(f"browse     {base}/ui   (texts and features; report: {base}/report, API: {base}/docs)")
    print(f"try        curl {example}")
    report = RunDirectory(named_run(run).location("report"))
    if names := report.names():
        print("report     " + "\n           ".join(report.location(name) for name in sorted(names)))


def _environment() -> dict[str, str]:
    # Authentication is set one way or the other, never left to Ray's default: only loopback reaches the dashboard.
    local = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if revision := git_revision():
        local["MTC_GIT_REVISION"] = revision  # jobs get a copy of the code without its repository
    local |= ENVIRONMENT
    local["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    }
    return inherited | local


def _known_head() -> dict[str, Any] | None:
    """The head that this checkout started last, which may have ended; None if there is none.

    A `head.json` that came here by a copy of another checkout is forgotten; its head and all that is that one's are
    left alone. Raises QuickstartError where the head is another user's.
    """
    if not STATE.exists():
        return None
    head: dict[str, Any] = json.loads(STATE.read_text())
    owner = Path(head["temporary"], OWNER)
    if owner.parent.exists() and owner.parent.stat().st_uid != os.getuid():
        raise QuickstartError(f"{STATE} is of a head of another user; use a checkout of your own")
    if owner.exists() and owner.read_text() != _mark(head):
        print(f"{STATE} is a copy: the head at {head['address']} is another checkout's and left alone", file=sys.stderr)
        _forget()
        return None
    return head


def _mark(head: dict[str, Any]) -> str:
    """The head's token, and what tells the directory of its state from copies of that: device and inode.

    Heads that were started before there were tokens are known by their temporary directory.
    """
    state = STATE.parent.stat()
    return f"{head['token']} {state.st_dev}:{state.st_ino}" if "token" in head else str(head["temporary"])


def _log() -> Path:
    return STATE.with_name("head.log")


def _remember(head: dict[str, Any]) -> None:
    STATE.write_text(json.dumps(head))
    STATE.with_name("prometheus.yml").write_text(json.dumps(scrape_config(head), indent=1))  # JSON is YAML


def _forget() -> None:
    STATE.with_name("prometheus.yml").unlink(missing_ok=True)
    STATE.unlink()


def _runs(head: dict[str, Any]) -> bool:
    """Whether the head of this checkout, and no other that came after it at its address, runs."""
    return bool(_processes(head)) and "session" in head and _session(head) == head["session"]


def _session(head: dict[str, Any]) -> str | None:
    """Ray's name for the session of whatever head answers at the dashboard's address."""
    try:
        answer = httpx.get(f"{head['dashboard']}/api/version", timeout=5)
        return str(answer.json()["session_name"]) if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError, KeyError):
        return None


def _processes(head: dict[str, Any]) -> list[psutil.Process]:
    """What a head started and that runs, jobs and HAProxy among it, which outlive a head that was killed."""
    mark, processes = _mark(head), psutil.process_iter(["environ"])  # None where somebody else's
    return [process for process in processes if (process.info["environ"] or {}).get(MARK) == mark]


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _free_ports(count: int, first: int | None = None) -> list[int]:
    """`count` free loopback ports; `first` is preferred if it is free."""
    sockets = []
    try:
        for wanted in [first or 0] + [0] * (count - 1):
            probe = socket.socket()
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not hold a port
            sockets.append(probe)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


if __name__ == "__main__":
    run_program(main)
