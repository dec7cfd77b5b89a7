"""What the training loop tells: rates, where wall time went, and each transcoder's metrics.

Imported by trainers only: the processes that coordinate them do without torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from cluster.batches import Batches
from cluster.blocks import ActorCosts
from cluster.job_metrics import ray_metric
from cluster.routing import Routing
from mtc.config import RunConfig
from mtc.results import PARTS, StreamTiming
from mtc.training import Clock, Health
from mtc.transcoder import agree, world_size

if TYPE_CHECKING:
    from mtc.training import StepMetrics, StepResult, Trainer


class Account:
    """What one rank has done and waited for, told to the driver and to Prometheus whenever metrics are logged."""

    def __init__(self, log: Any, run_id: str, rank: int, batches: Batches):
        self.log, self.rank, self.batches = log, rank, batches
        of_rank = {"run_id": run_id, "rank": str(rank)}
        self._all_tokens = ray_metric("mtc_trainer_tokens_total", **of_rank)
        self._seconds = ray_metric("mtc_trainer_seconds_total", **of_rank)
        self._durations = ray_metric("mtc_trainer_step_duration_seconds", **of_rank)
        self.before = dict.fromkeys(batches.clock.seconds, 0.0)  # the clock starts anew with the first activations
        self.costs_before = dict(batches.costs.sums)
        self.tokens_before = batches.own_tokens
        self.steps: list[float] = []
        self.stepped_at: float | None = None

    def step(self) -> None:
        """Count a step that is done; waits for nothing."""
        now = time.perf_counter()
        if self.stepped_at is not None:
            self.steps.append(now - self.stepped_at)
        self.stepped_at = now

    def write(self) -> dict[str, Any]:
        """Send and return what this rank did since the last time.

        `seconds` are this rank's by part, `model_seconds` what the units that it received have cost the model actors,
        `step_seconds` the times between its steps, `positions` the token positions of those units.
        """
        now, sums = self.batches.clock.read(), self.batches.costs.sums
        spent = {part: round(now[part] - self.before[part], 4) for part in now}
        costs = {name: round(sums[name] - self.costs_before[name], 4) for name in sums}
        tokens = self.batches.own_tokens - self.tokens_before
        account = {
            "rank": self.rank,
            "tokens": tokens,
            "seconds": spent,
            "model_seconds": {name: costs[name] for name in ("forward", "sending", "idle")},
            "positions": int(costs["positions"]),
            "step_seconds": [round(seconds, 5) for seconds in self.steps],
            "time": time.time(),
        }
        self.before, self.costs_before, self.tokens_before = now, dict(sums), self.batches.own_tokens
        self.log.append.remote(account)
        if tokens:
            self._all_tokens.inc(tokens)
        for part, value in spent.items():
            if value > 0:
                self._seconds.inc(value, {"part": part})
        for value in self.steps:
            self._durations.observe(value)
        self.steps = []
        return account


class Figures(NamedTuple):
    """What is written down of one transcoder."""

    metrics: StepMetrics
    """Figures of the newest step."""
    loss: float
    """Highest loss since the last row."""
    l0: float
    """Lowest L0 since the last row."""


class Journal:
    """The transcoders' figures: every rank notes those of its own, rank 0 tells the driver of all."""

    def __init__(self, log: Any, config: RunConfig, routing: Routing, trainers: Mapping[str, Trainer], clock: Clock):
        self.log, self.routing, self.clock = log, routing, clock
        self.members = config.members()
        self.tokens = next(iter(trainers.values())).tokens
        skipped = routing.gather([int(trainer.skipped[0]) for trainer in trainers.values()])
        self.health = [Health(m.config.transcoder.k, n) for m, n in zip(self.members, skipped, strict=True)]
        self.extremes: list[tuple[torch.Tensor, torch.Tensor]] = []
        """For each of this rank's transcoders the highest [loss, l0] and the lowest since the last row, on the
        device."""

    def look(self, done: list[StepResult]) -> None:
        """Take note of a step, whether it is written down or not; waits for nothing."""
        seen = [result.loss_and_l0() for result in done]
        before = self.extremes or [(values, values) for values in seen]
        self.extremes = [
            (torch.maximum(high, values), torch.minimum(low, values))
            for (high, low), values in zip(before, seen, strict=True)
        ]

    def read(self, done: list[StepResult]) -> list[Figures]:
        """All transcoders' figures since the last time; waits for the device, and is called on all ranks at once."""
        with self.clock.part("step"):
            own = [
                Figures(result.metrics(), float(high[0]), float(low[1]))
                for result, (high, low) in zip(done, self.extremes, strict=True)
            ]
        self.extremes = []
        with self.clock.part("all_reduce"):
            return self.routing.gather(own)

    def write(self, figures: Sequence[Figures], account: dict[str, Any]) -> None:
        """Send a row for each transcoder, with this rank's account since the last one."""
        wall = max(sum(account["seconds"].values()), 1e-9)
        tokens = figures[0].metrics.tokens
        speed, self.tokens = (tokens - self.tokens) / wall, tokens
        shared = {"tokens_per_second": speed, **{name: account[name] for name in ("seconds", "model_seconds", "time")}}
        for member, health, (row, loss, l0) in zip(self.members, self.health, figures, strict=True):
            about = {"member": member.name, "layer": member.config.model.layer}
            self.log.append.remote(row._asdict() | about | shared)
            for kind, message in health.look(row, loss, l0):
                where = f"{member.name}: " if len(self.members) > 1 else ""
                self.log.event.remote(kind, where + message, row.step)


def stream_timing(batches: Batches) -> StreamTiming:
    """The account of time of all ranks together; called on all at once."""
    clock, costs = batches.clock, batches.costs
    batches.settle_waits()
    seconds, ranks = clock.read(), world_size()
    *parts, startup = (n / ranks for n in agree(*(seconds[p] for p in PARTS), batches.startup_seconds))
    sums = agree(batches.calibrated, *(costs.sums[name] for name in ActorCosts.FIELDS))
    calibrated, forward, sending, idle, elapsed, positions, flops = sums
    (device_flops,) = agree(costs.device_flops, op=dist.ReduceOp.MAX)
    wall = sum(parts)
    tokens = batches.tokens + int(calibrated)
    return StreamTiming(
        tokens=tokens,
        wall_seconds=wall,
        startup_seconds=startup,
        trainers=ranks,
        trainer_seconds=dict(zip(PARTS, parts, strict=True)),
        actor_seconds=elapsed,
        forward_seconds=forward,
        sending_seconds=sending,
        idle_seconds=idle,
        captured_tokens=int(positions),
        forward_flops=flops,
        device_flops=device_flops,
        tokens_per_second=tokens / wall,
        forward_mfu=flops / (forward * device_flops) if forward else None,
        mfu=flops / (elapsed * device_flops) if elapsed else None,
    )
