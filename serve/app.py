"""The HTTP service of finished runs, as a Ray Serve application.

    serve run serve.app:build run=runs/latest           through Serve's own command line or a serveConfigV2
    python -m serve.app --run runs/latest --port 8000   deploys to a running Ray cluster

Two deployments: the replicas of `Server` answer, `Control` decides by which runs. With `interventions` a third,
`Circuits`, computes graphs and interventions.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` as a class, not as a string.

import argparse
import asyncio
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve as ray_serve

from mtc.config import describe_faults
from mtc.errors import MtcError
from mtc.joining import joining
from mtc.programs import program_name, runtime_env
from serve.contract import Settings
from serve.deployments import Circuits, Control, DeployError, Server, check_room, listen, roll_out
from serve.http import check_binding, read_keys
from serve.service import Catalogue

QUIET = {"enable_access_log": False}
"""Serve's access log would have the query strings of searches; the service writes one of its own, without."""


def build(args: Settings) -> ray_serve.Application:
    """The application, for `import_path: serve.app:build`. Raises RunError if neither the run can be served nor another
    one in its place.

    Each call is a deployment of its own: it answers by its settings, whatever the one before had come to. Processes
    that are started again within it have its name, and take over what it had decided.
    """
    entry, problem = Catalogue(args.run).usable(verify=False)
    if problem:
        _say(f"{problem}; meanwhile run {entry.key.run_id} answers")
    name = uuid.uuid4().hex
    control = _deployment(Control).options(ray_actor_options={"num_cpus": 0}, logging_config=QUIET).bind(args, name)
    replicas: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None and args.max_replicas > args.num_replicas:
        replicas = {
            "autoscaling_config": {
                "min_replicas": args.num_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_requests,
            }
        }
    resources = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    server = _deployment(Server).options(
        ray_actor_options=resources, logging_config=QUIET, max_surge_percent=args.max_surge_percent, **replicas
    )
    if not args.interventions:
        return server.bind(args, control, name)
    resources = {"num_cpus": args.interventions_num_cpus, "num_gpus": args.interventions_num_gpus}
    circuits = _deployment(Circuits).options(
        ray_actor_options=resources, logging_config=QUIET, max_surge_percent=args.max_surge_percent, num_replicas=1
    )
    return server.bind(args, control, name, circuits.bind(args, name))


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy to a running Ray cluster, in the place of what was served there; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=program_name("python -m serve.app"), description="Serve finished runs over HTTP."
    )
    parser.add_argument(
        "--run", required=True, help="directory or URL of a finished run, ROOT/latest or ROOT/production"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this need --keys")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--address", default="auto", help="the Ray cluster (%(default)s)")
    parser.add_argument("--keys", metavar="FILE", help="API keys, made by python -m serve.keys")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting, see docs/configuration.md; repeatable",
    )
    parser.add_argument(
        "--interventions", action="store_true",
        help="also answer POST /graph, /steer and /ablate, by a process that holds the whole language model in float32",
    )  # fmt: skip
    parser.add_argument(
        "--notes", action="store_true", help="let all who may ask write notes and stars beside the run's files"
    )
    parser.add_argument("--verbose", action="store_true", help="also show what Ray and the replicas say")
    parser.add_argument("--block", action="store_true", help="stay until interrupted, then stop the service")
    options = parser.parse_args(argv)
    try:
        # Before Ray starts anything, so that a wrong run costs a second and not a failed deployment.
        keys = os.path.abspath(options.keys) if options.keys else None
        check_binding(options.host, keys)
        if keys:
            read_keys(keys)
        if not 0 < options.port < 1 << 16:
            raise ValueError(f"--port {options.port}: 1 to 65535 is wanted")
        given = {"run": options.run, "api_keys_file": keys} | _settings(options.set)
        switches = {name: True for name in ("interventions", "notes") if getattr(options, name)}
        settings = Settings.model_validate(given | switches)
        application = build(settings)
        level = logging.INFO if options.verbose else logging.ERROR
        logging.getLogger("ray.serve").setLevel(level)  # what replicas and proxies say is in Ray's log files
        named = os.environ.get("RAY_ADDRESS") if options.address == "auto" else None
        with joining(named or options.address, "RAY_ADDRESS" if named else "--address"):
            ray.init(
                address=options.address,
                runtime_env=runtime_env() or None,
                log_to_driver=options.verbose,
                logging_level=level,
            )
    except ValidationError as error:
        _say(describe_faults(error, Settings))
        return 2
    except (MtcError, ValueError) as error:
        _say(str(error))
        return error.exit_code if isinstance(error, MtcError) else 2
    try:
        check_room(settings)
        listen(options.host, options.port)
        key = roll_out(application, settings, _say)
    except DeployError as error:
        _say(str(error))
        return error.exit_code
    print(f"serving {key.run_id} of {key.url} at http://{options.host}:{options.port}", flush=True)
    if options.block:
        try:
            while True:
                asyncio.run(asyncio.sleep(3600))
        except KeyboardInterrupt:
            ray_serve.shutdown()
    return 0


def _say(message: str) -> None:
    print(f"{program_name('serve.app')}: {message}", file=sys.stderr, flush=True)


def _settings(assignments: list[str]) -> dict[str, Any]:
    """NAME=VALUE; `null` is no value, what else stands for is the setting's to say."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: NAME=VALUE is wanted")
        found[name] = None if value == "null" else value
    return found


def _deployment(decorated: Any) -> ray_serve.Deployment:
    """What Serve's decorator returns; its type annotations say the class."""
    assert isinstance(decorated, ray_serve.Deployment)
    return decorated


if __name__ == "__main__":
    # Under its real name: what is defined in __main__ can't be imported by the replicas.
    from serve.app import main as imported_main

    sys.exit(imported_main())
