"""What of the cluster is free, who holds the rest, and waiting for room.

Ray waits without end and without a word for CPUs and GPUs that others hold, so a plan is made of what is free, and what
is waited for is said, and no longer than `cluster.room_seconds`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray._private.state import available_resources_per_node, state
from ray.core.generated.gcs_pb2 import ActorTableData, JobTableData  # type: ignore[attr-defined]
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.resources import Node, Plan, make_plan
from mtc.config import ConfigError, RunConfig
from mtc.errors import MtcError, one_line
from mtc.telemetry import say

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0  # between looks at the cluster
SAY_SECONDS = 30.0  # between lines about what is waited for
USUAL_SECONDS = 10.0  # in which a placement group is there, or those who ended have given back what they held
KINDS = ("CPU", "GPU")


class ClusterBusy(MtcError):
    """Others hold what the job needs, longer than `cluster.room_seconds`."""

    exit_code = 1
    event = "busy"


def cluster_nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive and have CPUs, with what is free of them now."""
    free, found = available_resources_per_node(), []
    for node in ray.nodes():
        has, left = node["Resources"], free.get(node["NodeID"], {})
        if node["Alive"] and has.get("CPU", 0) > 0:
            cpus, gpus = (round(min(left.get(kind, 0.0), has.get(kind, 0.0)), 4) for kind in KINDS)
            if gpus >= 1:
                gpus = float(int(gpus))  # the rest of a GPU has its memory taken
            held_cpus, held_gpus = (
                round(has.get(k, 0.0) - mine, 4) for k, mine in zip(KINDS, (cpus, gpus), strict=True)
            )
            is_head, memory = "node:__internal_head__" in has, has.get("memory", 0.0)
            store = has.get("object_store_memory", 0.0)
            found.append(Node(cpus, gpus, is_head, node["NodeID"], held_cpus, held_gpus, memory, object_store=store))
    return found


def plan_in_free_room(config: RunConfig, d_model: int | None) -> Plan:
    """Lay out a run in what is free of the connected cluster, and wait for that while others hold too much.

    Raises ConfigError if the run would not fit if all was free, and ClusterBusy after `cluster.room_seconds`. An
    autoscaler is not asked for nodes: a run is laid out on those that there are.
    """
    nodes = _settled_nodes()
    wait = _Wait("not enough of the cluster is free", config.cluster.room_seconds)
    while True:
        whole = make_plan(config, [node.whole() for node in nodes], d_model)
        # A cluster of GPUs that others use is no cluster of CPUs.
        settings = config.cluster.model_copy(update={"use_gpu": whole.device == "cuda"})
        try:
            return make_plan(config.model_copy(update={"cluster": settings}), nodes, d_model)
        except ConfigError as error:
            wait.go_on(f"{error}; {describe_holders()}")
        time.sleep(LOOK_SECONDS)
        nodes = cluster_nodes()


def _settled_nodes() -> list[Node]:
    """The cluster's nodes, when what a job that has just ended held is given back."""
    nodes, deadline = cluster_nodes(), time.monotonic() + USUAL_SECONDS
    while any(node.held_cpus or node.held_gpus for node in nodes) and time.monotonic() < deadline:
        time.sleep(1.0)
        before, nodes = nodes, cluster_nodes()
        if sum(n.held_cpus + n.held_gpus for n in nodes) >= sum(n.held_cpus + n.held_gpus for n in before):
            break
    return nodes


class PlacementWatch:
    """Says that this job's trainers have no place yet, and raises ClusterBusy if that lasts."""

    def __init__(self, plan: Plan, limit: float):
        self._plan, self._limit = plan, limit
        self._wait: _Wait | None = None
        self._next_look = 0.0

    def look(self) -> None:
        """Call it again and again, as often as you like."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        try:
            self._look()
        except ray.exceptions.RayError as error:  # of a head that starts again, say: no reason to end a training
            logger.warning("the trainers' place can't be looked at: %s", one_line(error))

    def _look(self) -> None:
        states = {group["state"] for group in own_placement_groups().values()}
        if "CREATED" in states:
            self._wait = None
        elif states & {"PENDING", "RESCHEDULING"}:
            if self._wait is None:  # Ray Train asks anew each minute: between two groups there is none
                self._wait = _Wait("the trainers have no place", self._limit, quiet=USUAL_SECONDS)
            plan = self._plan
            each = f"{plan.trainer_cpus:g} CPUs and {plan.trainer_gpus:g} GPUs"
            self._wait.go_on(f"{plan.num_trainers} x ({each}) are wanted, {describe_free()}")


@contextmanager
def reserved(
    each: dict[str, float], count: int, label_selector: dict[str, str] | None, limit: float,
    what: str = "the optional measurements have no place",
) -> Iterator[PlacementGroupSchedulingStrategy]:  # fmt: skip
    """A context with room for `count` tasks that need `each`; raises ClusterBusy if there is none within `limit`, which
    begins with `what`."""
    selectors = [label_selector] * count if label_selector else None
    group = placement_group([each] * count, bundle_label_selector=selectors)
    wait = _Wait(what, limit, quiet=USUAL_SECONDS)
    try:
        while not group.wait(LOOK_SECONDS):
            wait.go_on(f"{count} x {each} are wanted, {describe_free()}")
        yield PlacementGroupSchedulingStrategy(group)
    finally:
        remove_placement_group(group)


def own_placement_groups() -> dict[str, Any]:
    """The placement groups of this job that are not removed, by id."""
    job = ray.get_runtime_context().get_job_id()  # ends the id
    table = placement_group_table()
    return {name: group for name, group in table.items() if group["state"] != "REMOVED" and name.endswith(job)}


def describe_free() -> str:
    """What the cluster has, what of that is free, and who holds the rest, in a line."""
    nodes = cluster_nodes()
    parts = []
    for name, free, held in (
        ("CPUs", sum(node.cpus for node in nodes), sum(node.held_cpus for node in nodes)),
        ("GPUs", sum(node.gpus for node in nodes), sum(node.held_gpus for node in nodes)),
    ):
        if free + held:
            parts.append(f"{free:g} of {free + held:g} {name}")
    return f"free are {' and '.join(parts) or 'no CPUs'}; {describe_holders()}"


def describe_holders() -> str:
    """Who holds CPUs and GPUs, the largest share first."""
    held = holders()
    if not held:
        return "nobody is known to hold any"
    shares = sorted(held.items(), key=lambda item: (-item[1].get("GPU", 0), -item[1].get("CPU", 0)))
    said = []
    for who, share in shares:
        said.append(" and ".join(f"{amount:g} {kind}s" for kind, amount in share.items()) + f" by {who}")
    return "held are " + ", ".join(said[:8]) + (f" and {len(said) - 8} more" if len(said) > 8 else "")


def holders() -> dict[str, dict[str, float]]:
    """What actors and placement groups hold of CPUs and GPUs, by Serve deployment or job. Tasks are not known."""
    accessor = state._connect_and_get_accessor()
    entrypoints = {}
    for data in accessor.get_job_table():
        job = JobTableData.FromString(data)
        name = job.config.metadata.get("job_submission_id") or job.entrypoint
        entrypoints[job.job_id.hex()] = name if len(name) <= 80 else f"{name[:77]}..."
    mine = ray.get_runtime_context().get_job_id()

    def of_job(job: str) -> str:
        return "this job" if job == mine else f"job {job} ({entrypoints.get(job, 'unknown')})"

    found: dict[str, dict[str, float]] = defaultdict(dict)

    def add(who: str, resources: Any) -> None:
        for kind in KINDS:
            if amount := resources.get(kind, 0):
                found[who][kind] = round(found[who].get(kind, 0) + amount, 4)

    for data in accessor.get_actor_table(None, "ALIVE"):
        actor = ActorTableData.FromString(data)
        if actor.class_name.startswith("ServeReplica:"):  # of a placement group where it has one
            add(f"the service {actor.class_name.removeprefix('ServeReplica:')}", actor.required_resources)
        elif actor.is_detached:
            add(f"the detached actor {actor.name}", actor.required_resources)
        else:
            add(of_job(actor.job_id.hex()), actor.required_resources)
    for name, group in placement_group_table().items():
        if group["state"] == "CREATED":
            for bundle in group["bundles"].values():
                add(of_job(name[-len(mine) :]), bundle)
    return {who: share for who, share in found.items() if share}


class _Wait:
    """Says what is waited for, at first and then every SAY_SECONDS, and ends it."""

    def __init__(self, what: str, limit: float, quiet: float = 0.0):
        self._what, self._limit = what, limit
        self._began = time.monotonic()
        self._say_at = self._began + quiet

    def go_on(self, reason: str) -> None:
        """Raises ClusterBusy once it has taken too long."""
        now = time.monotonic()
        if now >= self._began + self._limit:
            raise ClusterBusy(
                f"{self._what}, since {now - self._began:.0f} s: {reason}; stop what holds them, or wait longer "
                f"(cluster.room_seconds={self._limit:g})"
            )
        if now >= self._say_at:
            self._say_at = now + SAY_SECONDS
            say("waiting", f"waiting, at most {self._limit:g} s: {self._what}: {reason}")
