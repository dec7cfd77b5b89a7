"""The GPUs that Ray hands out, before a run: whether torch sees them, and how two processes share one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.mps import PROGRAM, shared_gpu
from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig
from mtc.devices import DeviceError, gpu_memory, open_device
from mtc.telemetry import say

logger = logging.getLogger(__name__)

FREE_SECONDS = 60.0
"""Seconds that a free GPU on every node is waited for; a run waits longer, for Ray."""


def check_devices(config: RunConfig, plan: Plan) -> Plan:
    """Have a process on every node with GPUs look for one, before any work; returns the plan with what memory they
    have. A node whose GPUs are taken is passed over, and that of its GPUs stays as it is.

    Raises ConfigError with what a node's torch says if it sees none, and if `cluster.mps` is on though no GPU is shared
    here or MPS is not installed.
    """
    nodes = [node.node_id for node in plan.nodes if node.gpus]
    if config.cluster.mps and not (plan.shares_gpu and nodes == [ray.get_runtime_context().get_node_id()]):
        total = sum(node.gpus for node in plan.nodes)
        raise ConfigError(
            "cluster.mps is true, but no two processes share a GPU of the node that the job runs on: of "
            f"{total:g} GPUs on {len(nodes)} nodes a trainer gets {plan.trainer_gpus:g}, an actor {plan.actor_gpus:g}"
        )
    if config.cluster.mps and shutil.which(PROGRAM) is None:
        raise ConfigError(f"cluster.mps is true, but {PROGRAM}, which comes with NVIDIA's driver, is not on PATH")
    if plan.device != "cuda":
        return plan
    look = ray.remote(_look_at_device).options
    shared = {"num_cpus": 0, "num_gpus": plan.actor_gpus, "runtime_env": plan.runtime_env}
    on_node = partial(NodeAffinitySchedulingStrategy, soft=False)
    answers = {look(**shared, scheduling_strategy=on_node(node)).remote(): node for node in nodes}
    ready, busy = ray.wait(list(answers), num_returns=len(answers), timeout=FREE_SECONDS)
    memory: dict[str, int] = {}
    for answer in ready:
        found = ray.get(answer)
        if isinstance(found, str):
            raise ConfigError(f"node {answers[answer][:8]}: {found}")
        memory[answers[answer]] = found or 0
    for answer in busy:
        ray.cancel(answer)
        logger.warning("node %s: no GPU came free within %.0f s; others have them", answers[answer][:8], FREE_SECONDS)
    known = (node._replace(gpu_memory=memory.get(node.node_id, node.gpu_memory)) for node in plan.nodes)
    return plan._replace(nodes=tuple(known))


@contextmanager
def on_one_gpu(config: RunConfig, plan: Plan) -> Iterator[Plan]:
    """The plan with what its processes need to compute on one GPU at the same time, if `cluster.mps` asks for that.

    Raises ConfigError where MPS can't be had.
    """
    with shared_gpu(config.cluster.mps) as environment:
        if config.cluster.mps and not environment:
            raise ConfigError("cluster.mps is true, but MPS can't be had: the warning above says why not")
        if environment:
            say("mps", f"trainer and model actor share their GPU by MPS, in {environment['CUDA_MPS_PIPE_DIRECTORY']}")
        yield plan._replace(environment=tuple(environment.items()))


def _look_at_device() -> int | str | None:
    """Bytes of the GPU's memory, None where a CPU is taken for one, or why there is none."""
    try:
        device = open_device("cuda")
    except DeviceError as error:
        return str(error)
    return gpu_memory(device)
