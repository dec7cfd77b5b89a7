"""The GPUs that Ray hands out, before a run: whether torch sees them, and how two processes share one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from cluster.mps import shared_gpu
from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig

FREE_SECONDS = 120.0
"""How long a node's GPU may be taken by others, or its process take to start."""


def check_devices(plan: Plan) -> None:
    """Have a process on every node with GPUs look for one, before any work.

    Raises ConfigError with what a node's torch says if it sees none, or if no GPU is free.
    """
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if plan.device != "cuda":
        return
    look = ray.remote(_device_error).options
    shared = {"num_cpus": 0, "num_gpus": plan.actor_gpus, "runtime_env": plan.runtime_env}
    on_node = partial(NodeAffinitySchedulingStrategy, soft=False)
    nodes = [node.node_id for node in plan.nodes if node.gpus]
    answers = [look(**shared, scheduling_strategy=on_node(node)).remote() for node in nodes]
    for node, answer in zip(nodes, answers, strict=True):
        try:
            error = ray.get(answer, timeout=FREE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(answer)
            error = f"no GPU came free within {FREE_SECONDS:.0f} s; another job has them"
        if error:
            raise ConfigError(f"node {node[:8]}: {error}")


def _device_error() -> str | None:
    from mtc.devices import DeviceError, open_device  # torch, in the worker

    try:
        open_device("cuda")
    except DeviceError as error:
        return str(error)
    return None


@contextmanager
def on_one_gpu(config: RunConfig, plan: Plan) -> Iterator[Plan]:
    """The plan with what its processes need to compute on one GPU at the same time, if `cluster.mps` asks for that.

    Raises ConfigError if it can't be had: by two processes on a GPU of this node.
    """
    import ray

    if not config.cluster.mps:
        yield plan
        return
    here = [node.node_id for node in plan.nodes] == [ray.get_runtime_context().get_node_id()]
    if not (plan.shares_gpu and here):
        raise ConfigError("cluster.mps is true, but no two processes share a GPU of the node that the job runs on")
    with shared_gpu(True) as environment:
        if not environment:
            raise ConfigError("cluster.mps is true, but MPS can't be had; the log says why not")
        yield plan._replace(environment=tuple(environment.items()))
