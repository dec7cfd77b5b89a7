"""From the configuration and what the cluster has: how many trainers and model actors, with which CPUs and GPUs.

A plan that does not fit makes Ray wait for ever without a word, so it is checked here and refused with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mtc.config import ConfigError, RunConfig

# Several torch processes share cores: threads that spin while they wait would steal them from the others.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}

SMALLEST_SHARE = 0.1  # of a CPU, for a model actor


class Plan(NamedTuple):
    """The layout of one run."""

    device: str
    """`cuda` or `cpu`, for trainers and model actors."""
    num_trainers: int
    """Data-parallel trainer processes."""
    trainer_cpus: float
    """CPUs that Ray reserves for each trainer."""
    trainer_gpus: float
    """GPUs for each trainer, possibly a fraction of one."""
    trainer_threads: int
    """Torch threads of each trainer."""
    num_model_actors: int
    """Processes that hold the language model."""
    actor_cpus: float
    """CPUs that Ray reserves for each model actor."""
    actor_gpus: float
    """GPUs for each model actor."""
    actor_threads: int
    """Torch threads of each model actor."""

    def describe(self) -> str:
        trainer = f"{self.trainer_cpus:g} CPU, {self.trainer_gpus:g} GPU, {self.trainer_threads} threads"
        actor = f"{self.actor_cpus:g} CPU, {self.actor_gpus:g} GPU, {self.actor_threads} threads"
        return (
            f"plan ({self.device}): {self.num_trainers} trainers x ({trainer}) + "
            f"{self.num_model_actors} model actors x ({actor})"
        )


class Node(NamedTuple):
    """What one node offers."""

    cpus: float
    """CPUs that Ray may hand out."""
    gpus: float
    """GPUs that Ray may hand out."""


def make_plan(config: RunConfig, nodes: Sequence[Node]) -> Plan:
    """Lay out a run on the cluster's nodes; raises ConfigError if it does not fit."""
    settings = config.cluster
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    use_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    if use_gpu and gpus <= 0:
        raise ConfigError("cluster.use_gpu is true, but the cluster has 0 GPUs")
    plan = _gpu_plan(config, cpus, gpus) if use_gpu else _cpu_plan(config, nodes)
    if use_gpu and plan.num_trainers > max(gpus, 1):
        raise ConfigError(
            f"cluster.num_trainers={plan.num_trainers} trainers need a GPU each, the cluster has {gpus:g} GPUs"
        )
    wanted_cpus = plan.num_trainers * plan.trainer_cpus + plan.num_model_actors * plan.actor_cpus
    wanted_gpus = plan.num_trainers * plan.trainer_gpus + plan.num_model_actors * plan.actor_gpus
    if not _fits(plan, nodes):
        raise ConfigError(
            f"the run does not fit the cluster: cluster.num_trainers={plan.num_trainers} and "
            f"cluster.num_model_actors={plan.num_model_actors} need {wanted_cpus:g} CPUs and {wanted_gpus:g} GPUs, "
            f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"
        )
    if config.optimizer.batch_tokens % plan.num_trainers:
        raise ConfigError(
            f"optimizer.batch_tokens={config.optimizer.batch_tokens} is not a multiple of the {plan.num_trainers} "
            "trainers; set cluster.num_trainers"
        )
    return plan


def _cpu_plan(config: RunConfig, nodes: Sequence[Node]) -> Plan:
    """Half a CPU per trainer (a step is short beside the language model's pass); the actors share the rest.

    An actor lies on one node, so its share shrinks until all find a place.
    """
    cpus, largest = sum(node.cpus for node in nodes), max(node.cpus for node in nodes)
    trainers = config.cluster.num_trainers or (2 if cpus >= 2 and config.optimizer.batch_tokens % 2 == 0 else 1)
    actors = config.cluster.num_model_actors or max(len(nodes), int(cpus // 8))
    trainer_cpus = min(0.5, cpus / (2 * trainers))
    left = cpus - trainers * trainer_cpus
    share = max(left / actors * (0.5 if left <= actors else 0.9), SMALLEST_SHARE)
    trainer_threads = max(1, int(largest // (2 * trainers)))
    actor_threads = max(1, int(min(cpus // actors, largest)))
    while True:
        plan = Plan("cpu", trainers, trainer_cpus, 0, trainer_threads, actors, round(share, 2), 0, actor_threads)
        if share <= SMALLEST_SHARE or _fits(plan, nodes):
            return plan
        share = max(share * 0.9, SMALLEST_SHARE)


def _fits(plan: Plan, nodes: Sequence[Node]) -> bool:
    """Whether all processes find a node, the largest requests placed first."""
    left = [list(node) for node in nodes]
    requests = [(plan.actor_cpus, plan.actor_gpus)] * plan.num_model_actors
    requests += [(plan.trainer_cpus, plan.trainer_gpus)] * plan.num_trainers
    for cpus, gpus in sorted(requests, key=lambda r: (-r[1], -r[0])):
        place = next((n for n in left if n[0] + 1e-6 >= cpus > 0 and n[1] + 1e-6 >= gpus), None)
        if place is None:
            return False
        place[0] -= cpus
        place[1] -= gpus
    return True


def _gpu_plan(config: RunConfig, cpus: float, gpus: float) -> Plan:
    """One GPU is shared; of several, one in eight trains, since the language model's pass costs far more."""
    if gpus <= 1:
        trainers, actors = config.cluster.num_trainers or 1, config.cluster.num_model_actors or 1
        shares = (0.4 * gpus / trainers, 0.6 * gpus / actors)
    else:
        trainers = config.cluster.num_trainers or max(1, int(gpus // 8))
        actors = config.cluster.num_model_actors or max(1, int(gpus) - trainers)
        shares = (1.0, 1.0)
    each = min(1.0, round(cpus / (trainers + actors + 1), 2))
    return Plan("cuda", trainers, each, shares[0], 1, actors, each, shares[1], 1)
