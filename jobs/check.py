"""Say in seconds what of a run would fail, all of it at once: without a GPU and without starting Ray.

    python jobs/check.py --preset smollm2-135m
    python jobs/check.py --config my.yaml --transcoder.k 64 --nodes nodes.yaml
    RAY_ADDRESS=head:6379 python jobs/check.py --preset gemma-2-2b-layer17 --output.root s3://bucket/runs

It takes the options of jobs/train.py and looks at paths, model, text, extras and trackers, at the plan of the run and
at the memory that it takes. The nodes are those of --nodes, else of the cluster of RAY_ADDRESS, which is asked and
nothing is started on it, else this machine. What can't be told from here is said to be not checked.
Exit codes: 0 no problem was found, 1 the check itself failed, 2 there are problems.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.command_line import failed, parse_command_line, run_program
from mtc.config import RunConfig, to_yaml
from mtc.errors import MtcError
from mtc.storage import prepare_environment

if TYPE_CHECKING:
    from cluster.resources import Node
    from mtc.language_model import ModelInfo


class Found:
    """What a check has come to."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """What would end the run, each with its field, limit and value."""
        self.not_checked: list[str] = []
        """What can't be told from here, and why."""
        self.plan: str | None = None
        """The run's processes as a table, if they fit."""
        self.memory: str | None = None
        """What they take of memory as a table, if that is known."""

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context for one check: what it raises is a problem, or not checked where it may be otherwise next time."""
        try:
            yield
        except MtcError as error:
            (self.problems if error.exit_code in (2, 3) else self.not_checked).append(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config, options = parse_command_line(sys.argv[1:] if argv is None else argv, __doc__ or "", more=_options)
        if options.print_config:
            print(to_yaml(config), end="")
            return 0
        prepare_environment()
        found = check_run(config, options.nodes, options.verbose)
    except Exception as error:
        return failed(error)
    print(json.dumps(vars(found)) if options.json else describe(found))
    return 2 if found.problems else 0


def check_run(config: RunConfig, nodes: str | None, verbose: bool = False) -> Found:
    """Everything that can be told about a run before it starts; `nodes` is a file of `cluster.node_list`.

    Raises ConfigError for what is no such file.
    """
    # 3 s with torch and transformers, which help and what is wrong with an option do without.
    from cluster.checks import check_config
    from cluster.node_list import read_nodes

    listed = read_nodes(nodes) if nodes else None
    found = Found()
    config, info = check_config(config, found.kept)
    with found.kept():
        _check_plan(config, info, listed or _nodes(verbose), found)
    return found


def describe(found: Found) -> str:
    """What was found as text for people."""
    lines = [f"problem: {text}" for text in found.problems] + [f"not checked: {text}" for text in found.not_checked]
    count = len(found.problems)
    said = f"{count} problem{'s' * (count != 1)}" if count else "no problem found"
    said += f", {len(found.not_checked)} not checked" if found.not_checked else ""
    return "\n".join([*lines, *filter(None, (found.plan, found.memory)), said])


def _nodes(verbose: bool) -> list[Node]:
    """The nodes of the cluster of RAY_ADDRESS, or this machine."""
    from cluster.node_list import this_machine

    if os.environ.get("RAY_ADDRESS", "local") == "local":
        return this_machine()
    from cluster.pipeline import connected  # 2 s, of those who ask a cluster
    from cluster.room import cluster_nodes

    with connected(verbose):
        return [node.whole() for node in cluster_nodes()]


def _check_plan(config: RunConfig, info: ModelInfo | None, nodes: list[Node], found: Found) -> None:
    """The plan on these nodes, and the memory that it takes there."""
    from cluster.memory import check_memory, memory_plan
    from cluster.resources import make_plan

    plan = make_plan(config, nodes, info.d_model if info else None)
    found.plan = plan.describe()
    if info is None:
        found.not_checked.append("memory: it goes by the language model's sizes, which are not known")
        return
    if any(not node.memory for node in plan.nodes):
        found.not_checked.append("main memory: not all nodes' is known")
    with found.kept():
        found.memory = memory_plan(config, plan, info).describe()
        check_memory(config, plan, info, disk=math.inf)  # the driver's may be another machine's
    if plan.device == "cuda":
        if any(node.gpus and not node.gpu_memory for node in plan.nodes):
            found.not_checked.append("the GPUs' memory: not all nodes' is known")
        found.not_checked.append("whether torch sees the GPUs: only a process on their nodes can tell")
    if len(plan.nodes) > 1 and "://" not in config.output.root:
        found.not_checked.append(f"output.root={config.output.root}: whether all {len(nodes)} nodes share it")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", metavar="FILE", help="a YAML file of the nodes to plan for (docs/cluster.md)")
    parser.add_argument("--json", action="store_true", help="one JSON object: problems, not_checked, plan, memory")


if __name__ == "__main__":
    run_program(main)
