"""What Ray Train calls back: the stream for as many trainers as there are at a start, and news of failures.

The stream is what the checkpoint leaves to do, dealt so that each unit goes to the same trainer at every start.
Imported where Ray Train is used anyway; its processes do without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray.data
import ray.train
from numpy.typing import NDArray
from ray.train import DataConfig

from cluster.activations import activation_dataset, configure_data_context
from cluster.outcome import ANSWER_SECONDS, permanent_cause
from cluster.resources import Node, Plan, beside, make_plan
from cluster.resume import unneeded_units
from cluster.room import cluster_nodes
from mtc.config import ConfigError, RunConfig
from mtc.errors import known_cause, one_line
from mtc.storage import Checkpoints
from mtc.text import TokenStore, work_units

logger = logging.getLogger(__name__)

NO_UNIT = -1
"""Holds the place of a trainer that gets no more units."""


class StreamConfig(DataConfig):
    """Makes the Dataset of what the last checkpoint leaves to do and deals it to the trainers, unit by unit.

    Ray Train asks for it at every start, when it knows the number of trainers and after rank 0 chose the checkpoint and
    told `log`, a MetricsLog actor.
    The model actors are planned again for the nodes that there are.
    """

    def __init__(self, config: RunConfig, plan: Plan, run_url: str, store_url: str, d_model: int, log: Any):
        super().__init__()
        self.log = log
        self.config, self.plan, self.run_url, self.store_url, self.d_model = config, plan, run_url, store_url, d_model

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Sequence[str] | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        configure_data_context(self.config.cluster.stall_seconds)
        if (start := ray.get(self.log.chosen.remote(), timeout=ANSWER_SECONDS)) is None:
            newest = Checkpoints(self.run_url).latest()
            start = newest.name if newest else ""
        rows = remaining_units(self.config, self.run_url, self.store_url, world_size, start)
        try:
            nodes = _usable(self.plan, worker_node_ids or ())
            plan = beside(make_plan(self.config, nodes, self.d_model, num_trainers=world_size), self.plan)
        except ConfigError as error:  # nodes are missing; stall_seconds bounds the waiting for them
            logger.warning("%s; waiting for nodes", error)
            plan = self.plan
        plan = plan._replace(environment=self.plan.environment)
        if plan.device == "cuda" and world_size == 1 and worker_node_ids:
            plan = plan._replace(near=worker_node_ids[0])  # a GPU makes more activations than most networks carry
        dataset = activation_dataset(self.config, plan, self.store_url, rows, start)
        # Whole units, dealt in turn: none is dropped to make the shares equal.
        splits = dataset.streaming_split(world_size, equal=False, locality_hints=None)
        return [{"train": split} for split in splits]


def _usable(plan: Plan, trainers: Sequence[str]) -> list[Node]:
    """The nodes that there are now with what this job may use: of those of its plan what was free then, since what is
    held of them now is mostly its own; of others what is free and what its `trainers`, given by their nodes, hold."""
    planned = {node.node_id: node for node in plan.nodes}

    def with_trainers(node: Node) -> Node:
        there = trainers.count(node.node_id)
        cpus, gpus = there * plan.trainer_cpus, there * plan.trainer_gpus
        more = node._replace(cpus=node.cpus + cpus, gpus=node.gpus + gpus)
        return more._replace(held_cpus=node.held_cpus - cpus, held_gpus=node.held_gpus - gpus)

    return [planned.get(node.node_id) or with_trainers(node) for node in cluster_nodes()]


def remaining_units(config: RunConfig, run_url: str, store_url: str, trainers: int, start: str) -> NDArray[np.int64]:
    """Numbers of the units of which something is left after the checkpoint named `start`, in the order in which
    trainers are dealt them.

    Unit u is for trainer u modulo `trainers`, now and after every restart; where one's list is shorter, NO_UNIT holds
    its places.
    """
    work = work_units(TokenStore.open(store_url), config)
    left = np.arange(len(work.training) + len(work.calibration))
    if start:
        left = np.setdiff1d(left, unneeded_units(Checkpoints(run_url).wait_for(start), trainers), assume_unique=True)
    before = len(work.training) + len(work.calibration) - len(left)
    logger.info("stream of %d work units, %d trained before", len(left), before)
    return deal(left, trainers)


def deal(units: NDArray[np.int64], trainers: int) -> NDArray[np.int64]:
    """Numbers of units in an order that gives each trainer its own ones when it is dealt to them in turn."""
    mine = [units[units % trainers == rank] for rank in range(trainers)]
    turns = np.full((max(map(len, mine)), trainers), NO_UNIT, np.int64)
    for rank, own in enumerate(mine):
        turns[: len(own), rank] = own
    return turns.ravel()


class TellFailures(ray.train.UserCallback):
    """Tells the MetricsLog actor why trainers died, and ends the training where starting them again would not help."""

    def __init__(self, log: Any):
        self.log = log

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            reason = one_line(known_cause(error) or error)
            self.log.event.remote("failure", f"trainer {rank} died: {reason}", None)
        for error in worker_exceptions.values():
            if cause := permanent_cause(error):
                raise cause  # an error of a callback is one of Train's controller, after which it tries nothing more
