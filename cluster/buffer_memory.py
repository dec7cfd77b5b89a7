"""The memory of a trainer's shuffle buffer: how much it takes, and whether a trainer can have that. Without torch."""

from __future__ import annotations

from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig

ELEMENT_BYTES = 2  # bfloat16


def buffer_bytes(config: RunConfig, trainers: int, d_model: int) -> int:
    """Most bytes that the shuffle buffer of each of so many trainers takes: `data.replays` + 1 blocks, each up to a
    work unit larger than its share, and with repeats a unit that waits for room."""
    data = config.data
    blocks, unit = data.replays + 1, max(data.unit_tokens, data.context_length)
    rows = blocks * (data.shuffle_buffer_tokens // trainers // blocks + unit) + unit * (data.replays > 1)
    sites = {key for part in config.model.sites for key in (part.source_key, part.target_key)}
    return rows * len(sites) * d_model * ELEMENT_BYTES


def check_host_memory(config: RunConfig, plan: Plan, d_model: int) -> None:
    """Raises ConfigError if the trainers' shuffle buffers do not fit into the memory that Ray found on any node."""
    if plan.device != "cpu":
        return  # `cluster.gpus.check_devices` asks the GPUs
    on_one_node = 1 if plan.spread else plan.num_trainers
    needed = on_one_node * buffer_bytes(config, plan.num_trainers, d_model)
    most = max(node.memory for node in plan.nodes)
    if most and needed > most:
        raise ConfigError(no_room(config, needed, most, "the largest node has"))


def no_room(config: RunConfig, needed: int, there: float, where: str) -> str:
    """That the shuffle buffer takes `needed` bytes, of which only `there` are there."""
    data = config.data
    return (
        f"data.shuffle_buffer_tokens={data.shuffle_buffer_tokens} with data.replays={data.replays} and "
        f"data.unit_tokens={data.unit_tokens} takes {needed / 1e9:,.2f} GB of memory, {where} {there / 1e9:,.2f} GB: "
        "lower data.shuffle_buffer_tokens"
    )
