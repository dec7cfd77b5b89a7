"""Memory that a run's transcoders take in training, held against what a trainer has before any work is done.

A lower bound: what is counted here grows with the number and the size of the transcoders. The activations that wait in
the shuffle buffer, the language model and the libraries come besides.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig

FLOAT, ENTRY = 4, 80
"""Bytes of a float32, and of all that is noted of a chosen entry: token, feature, order, value and gradient."""
DENSE_COPIES = 4
"""Matrices of [tokens, features] float32 that the dense step holds at a time."""


class TrainingBytes(NamedTuple):
    """Bytes that all transcoders of a run take in one trainer."""

    device: int
    """Weights, gradients, Adam's two moments and what a step works with, where the trainer computes."""
    checkpoint: int
    """The copy of weights and moments in main memory from which a checkpoint is written; rank 0 has it."""


def training_bytes(config: RunConfig, d_model: int, trainers: int) -> TrainingBytes:
    """What the transcoders take in each of so many trainers."""
    rows = -(-config.optimizer.batch_tokens // trainers)
    parameters = held = dense = 0
    for _, member in config.members():
        settings, features = member.transcoder, member.transcoder.num_features
        parameters += 2 * d_model * features + features + d_model + (d_model**2 if settings.skip else 0)
        held += FLOAT * rows * (features + (len(settings.group_sizes) + 1) * d_model) + ENTRY * rows * settings.k
        if member.optimizer.backend != "sparse":  # which `auto` tries too
            dense = max(dense, DENSE_COPIES * FLOAT * rows * features)
    return TrainingBytes(4 * FLOAT * parameters + held + dense, 3 * FLOAT * parameters)


def check_main_memory(config: RunConfig, plan: Plan, d_model: int) -> None:
    """Raises ConfigError if no node has the main memory for its trainers' transcoders; nodes of unknown memory do."""
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return
    need = training_bytes(config, d_model, plan.num_trainers)
    together = 1 if plan.spread else plan.num_trainers
    wanted = need.checkpoint + (together * need.device if plan.device == "cpu" else 0)
    if wanted > max(known):
        where = f"of {together} trainers " if together > 1 else ""
        raise ConfigError(
            f"{_several(config)}: training takes at least {_gb(wanted)} of main memory {where}for weights, gradients, "
            f"Adam's moments, work and a checkpoint's copy, the largest node has {_gb(max(known))}; "
            f"{_advice(config)}"
        )


def check_gpu_memory(config: RunConfig, plan: Plan, d_model: int, memory: int) -> None:
    """Raises ConfigError if a GPU of `memory` bytes is too small for a trainer's transcoders, and on a shared one for
    the language model's layers beside them."""
    need = training_bytes(config, d_model, plan.num_trainers).device
    shared = 0
    if plan.shares_gpu:
        need *= plan.num_trainers
        shared = 2 * 12 * d_model**2 * (max(sites.layer for sites in config.model.sites) + 1) * plan.num_model_actors
    if need + shared > memory:
        beside = f" beside {_gb(shared)} of the language model" if shared else ""
        raise ConfigError(
            f"{_several(config)}: training takes at least {_gb(need)} of a GPU's memory for weights, gradients, Adam's "
            f"moments and work{beside}, a GPU has {_gb(memory)}; {_advice(config)}"
        )


def _several(config: RunConfig) -> str:
    count, fields = len(config.members()), "sweep" if config.sweep else "model.layers"
    return f"{fields} asks for {count} transcoders" if count > 1 else "transcoder.group_sizes"


def _advice(config: RunConfig) -> str:
    fewer = "train fewer at a time, or smaller ones" if len(config.members()) > 1 else "lower transcoder.group_sizes"
    return f"{fewer}, or lower optimizer.batch_tokens={config.optimizer.batch_tokens}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
