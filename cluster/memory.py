"""Memory that a trainer takes, held against what there is before any work is done. Without torch.

A lower bound: transcoders with all that training them needs, and the shuffle buffer. The language model and the
libraries come besides.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig

FLOAT, BFLOAT16, ENTRY = 4, 2, 80
"""Bytes of a float32, of a bfloat16, and of all that is noted of a chosen entry: token, feature, order, value and
gradient."""
DENSE_COPIES = 4
"""Matrices of [tokens, features] float32 that the dense step holds at a time."""


class TrainingBytes(NamedTuple):
    """Bytes that one trainer takes."""

    transcoders: int
    """Weights, gradients, Adam's two moments and what a step works with, where the trainer computes."""
    buffer: int
    """The shuffle buffer when it is fullest, where the trainer computes."""
    checkpoint: int
    """The copy of weights and moments in main memory from which a checkpoint is written; rank 0 has it."""

    @property
    def device(self) -> int:
        """All that lies where the trainer computes."""
        return self.transcoders + self.buffer


def training_bytes(config: RunConfig, d_model: int, trainers: int, on_gpu: bool = False) -> TrainingBytes:
    """What each of so many trainers takes."""
    rows = -(-config.optimizer.batch_tokens // trainers)
    parameters = dense = 0
    held: list[int] = []
    for _, member in config.members():
        settings, features = member.transcoder, member.transcoder.num_features
        parameters += 2 * d_model * features + features + d_model + (d_model**2 if settings.skip else 0)
        held.append(FLOAT * rows * (features + (len(settings.group_sizes) + 1) * d_model) + ENTRY * rows * settings.k)
        # `auto` tries it on a CPU; on a GPU it goes by what was recorded.
        if member.optimizer.backend == "dense" or (member.optimizer.backend == "auto" and not on_gpu):
            dense = max(dense, DENSE_COPIES * FLOAT * rows * features)
    buffer = _buffer_bytes(config, d_model, trainers)
    work = max(held) if on_gpu else sum(held)  # there transcoders step in turn, and none keeps its work
    return TrainingBytes(4 * FLOAT * parameters + work + dense, buffer, 3 * FLOAT * parameters)


def check_main_memory(config: RunConfig, plan: Plan, d_model: int) -> None:
    """Raises ConfigError if no node has the main memory for its trainers; nodes of unknown memory do."""
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return
    need = training_bytes(config, d_model, plan.num_trainers, plan.device == "cuda")
    together = 1 if plan.spread else plan.num_trainers
    wanted = need.checkpoint + (together * need.device if plan.device == "cpu" else 0)
    if wanted > max(known):
        beside = f" for {together} trainers" if together > 1 else ""
        raise ConfigError(
            f"{_asked(config, need)}: training takes at least {_gb(wanted)} of main memory{beside} "
            f"({_parts(config, need)}), the largest node has {_gb(max(known))}; {_advice(config, need)}"
        )


def check_gpu_memory(config: RunConfig, plan: Plan, d_model: int, memory: int) -> None:
    """Raises ConfigError if a GPU of `memory` bytes is too small for a trainer, and a shared one for the language
    model's layers beside it."""
    need = training_bytes(config, d_model, plan.num_trainers, on_gpu=True)
    wanted, shared = need.device, 0
    if plan.shares_gpu:
        wanted *= plan.num_trainers
        shared = 2 * 12 * d_model**2 * (max(sites.layer for sites in config.model.sites) + 1) * plan.num_model_actors
    if wanted + shared > memory:
        beside = f" beside {_gb(shared)} of the language model" if shared else ""
        raise ConfigError(
            f"{_asked(config, need)}: training takes at least {_gb(wanted)} of a GPU's memory ({_parts(config, need)})"
            f"{beside}, a GPU has {_gb(memory)}; {_advice(config, need)}"
        )


def _buffer_bytes(config: RunConfig, d_model: int, trainers: int) -> int:
    """`data.replays` + 1 blocks, each up to a work unit larger than its share, and with repeats a unit that waits for
    room."""
    data = config.data
    blocks, unit = data.replays + 1, max(data.unit_tokens, data.context_length)
    rows = blocks * (data.shuffle_buffer_tokens // trainers // blocks + unit) + unit * (data.replays > 1)
    sites = {key for part in config.model.sites for key in (part.source_key, part.target_key)}
    return rows * len(sites) * d_model * BFLOAT16


def _asked(config: RunConfig, need: TrainingBytes) -> str:
    """The field that takes most."""
    if need.buffer > need.transcoders:
        return f"data.shuffle_buffer_tokens={config.data.shuffle_buffer_tokens} with data.replays={config.data.replays}"
    count, fields = len(config.members()), "sweep" if config.sweep else "model.layers"
    return f"{fields} asks for {count} transcoders" if count > 1 else "transcoder.group_sizes"


def _parts(config: RunConfig, need: TrainingBytes) -> str:
    return (
        f"for each {_gb(need.transcoders)} of weights, gradients, Adam's moments and work, {_gb(need.buffer)} of "
        f"shuffle buffer; {_gb(need.checkpoint)} for a checkpoint's copy"
    )


def _advice(config: RunConfig, need: TrainingBytes) -> str:
    if need.buffer > need.transcoders:
        return "lower data.shuffle_buffer_tokens"
    fewer = "train fewer at a time, or smaller ones" if len(config.members()) > 1 else "lower transcoder.group_sizes"
    return f"{fewer}, or lower optimizer.batch_tokens={config.optimizer.batch_tokens}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
