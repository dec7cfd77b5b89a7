"""Which trainer trains which transcoder, where a run has several of both. Without torch.

With `cluster.split: tokens` every trainer has all transcoders, a share of every batch, and exchanges gradients. With
`transcoders` each transcoder is on one trainer, which gets the whole batch of its sites from all others: what travels
are rows of activations instead of gradients, and weights, moments and Adam's work lie on one trainer instead of on all.
"""

from __future__ import annotations

from typing import Literal

from mtc.config import RunConfig

# What one GPU does in a second. Estimates for an H100, of which ratios matter here; docs/gpu.md derives them.
PRODUCT_FLOPS = 400e12
"""Operations per second of the one product of a training step."""
STEP_BYTES = 2e12
"""Bytes per second that a training step moves for its chosen entries and for Adam."""
STEP_SECONDS = 2.5e-3
"""Least seconds of a training step: the host starts some hundreds of kernels."""
ENTRY_PASSES = 8
"""Rows of d_model float32 that a step reads or writes for each chosen entry."""
ADAM_PASSES = 7
"""Times that Adam reads or writes a parameter, float32."""


def split_of(config: RunConfig, trainers: int) -> Literal["tokens", "transcoders"]:
    """What so many trainers divide among them. By default transcoders wherever each trainer gets one: rows of a batch
    are fewer bytes than the gradients of a dictionary of more features than a quarter of the batch."""
    if trainers == 1 or config.cluster.split == "tokens":
        return "tokens"
    return "transcoders" if trainers <= len(config.members()) else "tokens"


def placed_members(config: RunConfig, trainers: int) -> list[list[str]]:
    """Names of the transcoders that each of so many trainers has, by rank, in the run's order: where tokens are split
    all, else those that `place` gives it."""
    members = config.members()
    if split_of(config, trainers) == "tokens":
        return [[member.name for member in members] for _ in range(trainers)]
    costs = [step_seconds_per_width(member.config) for member in members]
    return [[members[at].name for at in mine] for mine in place(costs, trainers)]


def place(costs: list[float], trainers: int) -> list[list[int]]:
    """[trainers] lists of places in `costs`, ascending: the dearest first, each where least is placed yet. Every
    trainer gets one where there are as many."""
    loads, placed = [0.0] * trainers, [[] for _ in range(trainers)]  # type: list[float], list[list[int]]
    for at in sorted(range(len(costs)), key=lambda at: (-costs[at], at)):
        rank = loads.index(min(loads))
        loads[rank] += costs[at]
        placed[rank].append(at)
    return [sorted(mine) for mine in placed]


def step_seconds_per_width(member: RunConfig) -> float:
    """Seconds that a sparse step of one transcoder takes the device, for each dimension of d_model: one product of
    d_model x features, the rows of its chosen entries, and Adam's weights."""
    batch, features = member.optimizer.batch_tokens, member.transcoder.num_features
    product = 2 * batch * features / PRODUCT_FLOPS
    entries = batch * member.transcoder.k * 4 * ENTRY_PASSES / STEP_BYTES
    adam = 2 * features * 4 * ADAM_PASSES / STEP_BYTES
    return product + entries + adam


def step_seconds(member: RunConfig, d_model: int) -> float:
    """Seconds of a sparse step of one transcoder on a GPU, estimated; at least the time in which the host can start
    it."""
    return max(STEP_SECONDS, d_model * step_seconds_per_width(member))
