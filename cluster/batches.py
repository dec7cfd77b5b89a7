"""What a trainer does beside training: batches, the ledger of finished units, the account of time and metrics."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cluster.activations import ActorCosts

if TYPE_CHECKING:
    from mtc.shuffle import ShuffleBuffer, Unit
    from mtc.timing import Clock, StreamTiming
    from mtc.training import StepResult, Trainer


class Batches:
    """From the stream through the shuffle buffer to batches, the same number on all ranks."""

    def __init__(
        self,
        units: Iterator[Unit],
        buffer: ShuffleBuffer,
        batch: int,
        ledger: Ledger,
        clock: Clock,
    ):
        self.units, self.buffer, self.batch, self.ledger = units, buffer, batch, ledger
        self.clock = clock
        self.costs = ActorCosts()
        """Of all units but the first."""
        self.tokens = 0
        """Taken by all ranks."""
        self.startup_seconds = 0.0
        """Until the first unit arrived."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._moments = self._moments_with_a_batch()

    def all_ready(self) -> bool:
        """Whether every rank can take one more batch; called on all ranks at once."""
        import torch
        import torch.distributed as dist

        here = next(self._moments, False)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return here
        self._finish_steps()
        with self.clock.part("all_reduce"):
            flag = torch.tensor(int(here), device=self.buffer.device)
            dist.all_reduce(flag, dist.ReduceOp.MIN)
            return bool(flag)

    def take(self) -> tuple[Any, ...]:
        import torch.distributed as dist

        ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.tokens += self.batch * ranks
        with self.clock.part("transport"):
            return self.buffer.take(self.batch)

    def _moments_with_a_batch(self) -> Iterator[bool]:
        """Fill the buffer from the stream; yields True whenever a batch can be taken, until both are empty."""
        while True:
            self._finish_steps()
            with self.clock.part("waiting"):
                unit = next(self.units, None)
            if unit is None:
                break
            if self.startup_seconds:
                self.costs.add(unit)
            else:
                self.startup_seconds = time.perf_counter() - self._started
                self.clock.reset()
            with self.clock.part("transport"):
                self.buffer.add(unit)
                self.ledger.seen.add(unit.number)
            while self.buffer.ready(self.batch):
                yield True
        while self.buffer.size >= self.batch:
            yield True

    def settle_waits(self) -> None:
        """Count what ranks waited for each other inside their steps as such; on a GPU this waits for the device."""
        from mtc.distributed import waits

        with self.clock.part("step"):
            waited = waits.seconds()
        self.clock.move("step", "all_reduce", waited - self._waited)
        self._waited = waited

    def _finish_steps(self) -> None:
        """What a GPU still computes before the host has to wait anyway belongs to training, not to the waiting."""
        import torch

        if self.buffer.device.type == "cuda":
            with self.clock.part("step"):
                torch.cuda.current_stream(self.buffer.device).synchronize()


class Journal:
    """Rank 0's account of training to the driver."""

    def __init__(self, log: Any, trainers: list[Trainer], batches: Batches):
        self.log, self.batches, self.clock = log, batches, batches.clock
        self.layers = [trainer.config.model.layer for trainer in trainers]
        self.before = dict.fromkeys(self.clock.seconds, 0.0)  # the clock starts anew with the first activations
        self.costs_before = dict(batches.costs.sums)
        self.tokens = trainers[0].tokens

    def write(self, done: list[StepResult]) -> None:
        """Send a row for each layer; waits for the device.

        `seconds` are this rank's since the last row, by part; `model_seconds` what the units that it received since
        then have cost the model actors.
        """
        with self.clock.part("step"):
            metrics = [result.metrics() for result in done]
        now = self.clock.read()
        spent = {part: now[part] - self.before[part] for part in now}
        wall = max(sum(spent.values()), 1e-9)
        speed = (metrics[0].tokens - self.tokens) / wall
        self.before, self.tokens = now, metrics[0].tokens
        sums = self.batches.costs.sums
        model = {name: round(sums[name] - self.costs_before[name], 4) for name in ("forward", "sending", "idle")}
        self.costs_before = dict(sums)
        shared = {"tokens_per_second": speed, "seconds": {part: round(value, 4) for part, value in spent.items()}}
        shared["model_seconds"] = model
        for layer, row in zip(self.layers, metrics, strict=True):
            self.log.append.remote(row._asdict() | {"layer": layer} | shared)


def stream_timing(batches: Batches) -> StreamTiming:
    """The account of all ranks together; called on all at once."""
    import torch
    import torch.distributed as dist

    from mtc.distributed import all_reduce, world_size
    from mtc.timing import PARTS, StreamTiming

    clock, costs, device = batches.clock, batches.costs, batches.buffer.device
    batches.settle_waits()
    seconds, ranks = clock.read(), world_size()
    mean = torch.tensor([seconds[p] for p in PARTS] + [batches.startup_seconds], dtype=torch.float64, device=device)
    total = torch.tensor([costs.sums[name] for name in ActorCosts.FIELDS], dtype=torch.float64, device=device)
    rate = torch.tensor(costs.device_flops, dtype=torch.float64, device=device)
    all_reduce(mean)
    all_reduce(total)
    all_reduce(rate, dist.ReduceOp.MAX)
    *parts, startup = (mean / ranks).tolist()
    forward, sending, idle, elapsed, positions, flops = total.tolist()
    device_flops, wall = float(rate), sum(parts)
    return StreamTiming(
        tokens=batches.tokens,
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
        tokens_per_second=batches.tokens / wall,
        forward_mfu=flops / (forward * device_flops) if forward else None,
        mfu=flops / (elapsed * device_flops) if elapsed else None,
    )


class Ledger:
    """Work units that this rank has received; rank 0 also carries those of earlier starts."""

    def __init__(self, rank: int):
        self.rank = rank
        self.earlier: set[int] = set()
        self.seen: set[int] = set()

    def restore(self, directory: str) -> None:
        if self.rank == 0:
            self.earlier = read_ledger(directory)

    def write(self, directory: str, buffer: ShuffleBuffer) -> None:
        finished = self.earlier | (self.seen - buffer.units())
        with open(os.path.join(directory, f"units_{self.rank}.json"), "w") as file:
            json.dump(sorted(finished), file)


def read_ledger(directory: str) -> set[int]:
    units: set[int] = set()
    for name in os.listdir(directory):
        if name.startswith("units_"):
            with open(os.path.join(directory, name)) as file:
                units |= set(json.load(file))
    return units
