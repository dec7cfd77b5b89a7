"""The Ray Train job: data-parallel training on the activation stream, checkpoints, resume and calibration.

A checkpoint holds the Trainer's state and, per rank, the ledger of finished work units. The stream is built anew at
every start from the units that the last checkpoint does not list, so a restart trains what is left. A unit is finished
when all its tokens left the shuffle buffer; one with a token still there is streamed again as a whole, so a restart
trains some tokens twice: in a run that is short beside its buffer, many.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.activations import ActorCosts, activation_dataset, configure_data_context, iterate_units
from cluster.resources import WORKER_ENVIRONMENT, Plan
from mtc.config import RunConfig
from mtc.runs import RunDirectory

if TYPE_CHECKING:
    import ray.data
    import ray.train
    import torch

    from mtc.shuffle import ShuffleBuffer, Unit
    from mtc.timing import Clock, StreamTiming
    from mtc.training import StepResult, Trainer

logger = logging.getLogger(__name__)

INITIAL_ROWS = 16_384  # tokens per rank from which scales and biases are set


class TrainResult(NamedTuple):
    """What the trainers report at the end, of one layer."""

    layer: int
    """Layer of the language model."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Tokens trained on."""
    threshold: float
    """Calibrated inference threshold."""
    calibration_tokens: int
    """Fresh tokens that it was calibrated on."""
    precision: str
    """Arithmetic of the transcoder's products."""
    compute: str = ""
    """How the training loss was computed, and how long the alternatives took."""


class Trained(NamedTuple):
    """What training leaves beside the weights."""

    layers: tuple[TrainResult, ...]
    """One for each entry of `model.sites`."""
    timing: StreamTiming
    """What waited on what."""


def train(config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, d_model: int, log: Any) -> Trained:
    """Train, calibrate and write each layer's `transcoder.safetensors`; `log` is a MetricsLog actor's handle.

    Continues from the run's last checkpoint if there is one. Raises ray.train.TrainingFailedError after
    `cluster.max_failures` restarts.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    last = _last_checkpoint(run.url)
    if last is not None and (result := _finished_training(last, run)) is not None:
        return result  # an earlier attempt ended after the training

    def make_dataset() -> ray.data.Dataset:
        return _remaining_units(config, plan, run.url, store_url)

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"config": config, "plan": plan, "d_model": d_model, "log": log},
        torch_config=TorchConfig(backend="nccl" if plan.device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_trainers,
            use_gpu=plan.device == "cuda",
            resources_per_worker={"CPU": plan.trainer_cpus} | ({"GPU": plan.trainer_gpus} if plan.trainer_gpus else {}),
            placement_strategy="SPREAD" if plan.spread else "PACK",
        ),
        datasets={"train": make_dataset},
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=run.url,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},  # type: ignore[call-arg]  # of Train v2
        ),
    )
    outcome = _interruptible(trainer.fit)
    assert outcome.checkpoint is not None
    finished = _finished_training(outcome.checkpoint, run)
    assert finished is not None, "the workers end with a checkpoint of the result"
    return finished


def _finished_training(checkpoint: ray.train.Checkpoint, run: RunDirectory) -> Trained | None:
    """The result in a checkpoint, its weights copied into the run; None while training is not at its end."""
    from mtc.timing import StreamTiming

    with checkpoint.as_directory() as directory:
        if not os.path.exists(os.path.join(directory, "result.json")):
            return None
        with open(os.path.join(directory, "result.json")) as file:
            result = json.load(file)
        layers = tuple(TrainResult(**layer) for layer in result["layers"])
        for layer in layers:
            with open(_weights(directory, "transcoder", layer.layer), "rb") as weights:
                run.for_layer(layer.layer).write("transcoder.safetensors", weights.read())
        return Trained(layers, StreamTiming(**result["timing"]))


def _last_checkpoint(run_url: str) -> ray.train.Checkpoint | None:
    import ray.train

    try:
        return ray.train.Result.from_path(os.path.join(run_url, "checkpoints")).checkpoint
    except (RuntimeError, FileNotFoundError):  # the first start: nothing is there yet
        return None


def _interruptible(call: Callable[[], ray.train.Result]) -> ray.train.Result:
    """`call()` in a thread of its own, so that Ctrl-C and SIGTERM reach this one as KeyboardInterrupt.

    In the main thread Train would install its own SIGINT handler, which ends the process with exit code 1.
    """
    outcome: queue.SimpleQueue[ray.train.Result | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(call())
        except BaseException as error:  # handed to the waiting thread, which raises it
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    result = outcome.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _remaining_units(config: RunConfig, plan: Plan, run_url: str, store_url: str) -> ray.data.Dataset:
    """The stream of units that the last checkpoint does not list; runs in Train's controller at every start."""

    from mtc.tokens import TokenStore
    from mtc.work import work_units

    configure_data_context()
    finished: set[int] = set()
    checkpoint = _last_checkpoint(run_url)
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            finished = _read_ledger(directory)
    units = work_units(TokenStore.open(store_url), config, plan.num_trainers)
    left = [(number, windows) for number, windows in enumerate(units) if number not in finished]
    logger.info("stream of %d work units, %d of %d trained before", len(left), len(finished), len(units))
    return activation_dataset(config, plan, store_url, left)


def _train_worker(settings: dict[str, Any]) -> None:
    """One rank. Every rank makes the same collective calls in the same order, whatever its shard holds."""
    import ray.train
    import ray.train.torch
    import torch

    from mtc.shuffle import ShuffleBuffer, to_device
    from mtc.timing import Clock
    from mtc.training import Trainer

    config, plan = settings["config"], settings["plan"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan.trainer_threads)
    device = ray.train.torch.get_device()
    d_model = settings["d_model"]
    trainers = [Trainer(alone, d_model, d_model, device) for alone in config.for_layers()]
    capacity = config.data.shuffle_buffer_tokens // world
    buffer = ShuffleBuffer(capacity, config.data.seed * world + rank, device)
    ledger = _Ledger(rank)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            for trainer in trainers:
                _load(trainer, directory)
            ledger.restore(directory)
    clock, costs = Clock(), ActorCosts()
    units = to_device(iterate_units(ray.train.get_dataset_shard("train"), costs), device)
    batch = config.optimizer.batch_tokens // world
    batches = _Batches(units, buffer, batch, ledger, clock, costs)
    journal = _Journal(settings["log"], trainers, clock) if rank == 0 else None

    lead = trainers[0]
    while lead.step_number < config.total_steps:
        if not batches.all_ready():
            raise RuntimeError(
                f"the activation stream ended at step {lead.step_number} of {config.total_steps}: "
                "work units were lost or hold fewer tokens than the token store says"
            )
        with clock.part("step"):
            if lead.step_number == 0:
                rows = [column[:INITIAL_ROWS] for column in buffer.peek()]
                for trainer, source, target in zip(trainers, rows[::2], rows[1::2], strict=True):
                    trainer.initialise(source, target)
        columns = batches.take()
        with clock.part("step"):
            done = [
                trainer.step(source, target)
                for trainer, source, target in zip(trainers, columns[::2], columns[1::2], strict=True)
            ]
        last = lead.step_number == config.total_steps
        if journal and (lead.step_number % config.cluster.log_every_steps == 0 or lead.step_number == 1 or last):
            journal.write(done)
        if lead.step_number % config.cluster.checkpoint_every_steps == 0 and not last:
            with clock.part("checkpoint"):
                _report(trainers, buffer, ledger, rank)

    calibration = _calibrate(config, trainers, batches)
    timing = _stream_timing(clock, costs, batches.tokens, batches.startup_seconds, device)
    results = [
        TrainResult(
            sites.layer,
            trainer.step_number,
            trainer.tokens,
            float(trainer.transcoder.threshold),
            calibration,
            "bfloat16" if trainer.compute and trainer.compute.bfloat16 else "float32",
            trainer.describe_compute(),
        )
        for sites, trainer in zip(config.model.sites, trainers, strict=True)
    ]
    _report(trainers, buffer, ledger, rank, Trained(tuple(results), timing))


def _calibrate(config: RunConfig, trainers: list[Trainer], batches: _Batches) -> int:
    """Set every transcoder's threshold on what follows in the stream; returns how many tokens that was."""
    from mtc.training import Calibrator

    calibrators = [Calibrator(trainer.transcoder) for trainer in trainers]
    wanted = -(-config.transcoder.calibration_tokens // config.optimizer.batch_tokens)
    calibrated = 0
    while calibrated < wanted and batches.all_ready():
        columns = batches.take()
        with batches.clock.part("step"):
            for calibrator, source in zip(calibrators, columns[::2], strict=True):
                calibrator.add(source)
        calibrated += 1
    if not calibrated:
        raise RuntimeError("the activation stream ended before a single batch for calibrating the threshold")
    with batches.clock.part("step"):
        for calibrator in calibrators:
            calibrator.finish()
    return calibrated * config.optimizer.batch_tokens


class _Batches:
    """From the stream through the shuffle buffer to batches, the same number on all ranks."""

    def __init__(
        self,
        units: Iterator[Unit],
        buffer: ShuffleBuffer,
        batch: int,
        ledger: _Ledger,
        clock: Clock,
        costs: ActorCosts,
    ):
        self.units, self.buffer, self.batch, self.ledger = units, buffer, batch, ledger
        self.clock, self.costs = clock, costs
        self.tokens = 0
        """Taken by all ranks."""
        self.startup_seconds = 0.0
        """Until the first unit arrived."""
        self._started = time.perf_counter()
        self._moments = self._moments_with_a_batch()

    def all_ready(self) -> bool:
        """Whether every rank can take one more batch; called on all ranks at once."""
        import torch
        import torch.distributed as dist

        here = next(self._moments, False)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return here
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
            with self.clock.part("waiting"):
                unit = next(self.units, None)
            if unit is None:
                break
            if not self.startup_seconds:
                self.startup_seconds = time.perf_counter() - self._started
                self.clock.reset()
                self.costs.reset()
            with self.clock.part("transport"):
                self.buffer.add(unit)
                self.ledger.seen.add(unit.number)
            while self.buffer.ready(self.batch):
                yield True
        while self.buffer.size >= self.batch:
            yield True


class _Journal:
    """Rank 0's account of training to the driver."""

    def __init__(self, log: Any, trainers: list[Trainer], clock: Clock):
        self.log, self.clock = log, clock
        self.layers = [trainer.config.model.layer for trainer in trainers]
        self.before = clock.read()
        self.tokens = trainers[0].tokens

    def write(self, done: list[StepResult]) -> None:
        """Send a row for each layer; waits for the device."""
        with self.clock.part("step"):
            metrics = [result.metrics() for result in done]
        now = self.clock.read()
        # The clock begins anew with the first activations; what came before is the start-up.
        spent = {part: now[part] - self.before[part] for part in now} if now["step"] >= self.before["step"] else now
        wall = max(sum(spent.values()), 1e-9)
        speed = (metrics[0].tokens - self.tokens) / wall
        self.before, self.tokens = now, metrics[0].tokens
        shared = {"tokens_per_second": speed, "seconds": {part: round(value, 4) for part, value in spent.items()}}
        for layer, row in zip(self.layers, metrics, strict=True):
            self.log.append.remote(row._asdict() | {"layer": layer} | shared)


def _stream_timing(
    clock: Clock, costs: ActorCosts, tokens: int, startup_seconds: float, device: torch.device
) -> StreamTiming:
    """The account of all ranks together; called on all at once."""
    import torch
    import torch.distributed as dist

    from mtc.distributed import all_reduce, waits, world_size
    from mtc.timing import PARTS, StreamTiming

    clock.move("step", "all_reduce", waits.seconds())
    seconds = clock.read()
    ranks = world_size()
    mean = torch.tensor([seconds[part] for part in PARTS] + [startup_seconds], dtype=torch.float64, device=device)
    total = torch.tensor([costs.sums[name] for name in ActorCosts.FIELDS], dtype=torch.float64, device=device)
    most = torch.tensor([float(len(costs.actors)), costs.device_flops], dtype=torch.float64, device=device)
    all_reduce(mean)
    all_reduce(total)
    all_reduce(most, dist.ReduceOp.MAX)
    *parts, startup = (mean / ranks).tolist()
    forward, sending, idle, positions, flops = total.tolist()
    actors, device_flops, wall = int(most[0]), float(most[1]), sum(parts)
    return StreamTiming(
        tokens=tokens,
        wall_seconds=wall,
        startup_seconds=startup,
        trainers=ranks,
        trainer_seconds=dict(zip(PARTS, parts, strict=True)),
        model_actors=actors,
        forward_seconds=forward,
        sending_seconds=sending,
        idle_seconds=idle,
        captured_tokens=int(positions),
        forward_flops=flops,
        device_flops=device_flops,
        tokens_per_second=tokens / wall,
        forward_mfu=flops / (forward * device_flops) if forward else None,
        mfu=flops / (wall * actors * device_flops) if actors else None,
    )


class _Ledger:
    """Work units that this rank has received; rank 0 also carries those of earlier starts."""

    def __init__(self, rank: int):
        self.rank = rank
        self.earlier: set[int] = set()
        self.seen: set[int] = set()

    def restore(self, directory: str) -> None:
        if self.rank == 0:
            self.earlier = _read_ledger(directory)

    def write(self, directory: str, buffer: ShuffleBuffer) -> None:
        finished = self.earlier | (self.seen - buffer.units())
        with open(os.path.join(directory, f"units_{self.rank}.json"), "w") as file:
            json.dump(sorted(finished), file)


def _read_ledger(directory: str) -> set[int]:
    units: set[int] = set()
    for name in os.listdir(directory):
        if name.startswith("units_"):
            with open(os.path.join(directory, name)) as file:
                units |= set(json.load(file))
    return units


def _report(
    trainers: list[Trainer], buffer: ShuffleBuffer, ledger: _Ledger, rank: int, result: Trained | None = None
) -> None:
    """Write a checkpoint; each rank adds its ledger, rank 0 the state. Called on all ranks at the same step."""
    import ray.train
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as directory:
        ledger.write(directory, buffer)
        if rank == 0:
            for trainer in trainers:
                layer = trainer.config.model.layer
                save_file(trainer.state_dict(), _weights(directory, "trainer", layer))
                if result is not None:
                    with open(_weights(directory, "transcoder", layer), "wb") as weights:
                        weights.write(trainer.transcoder.to_bytes())
            if result is not None:
                layers = [layer._asdict() for layer in result.layers]
                with open(os.path.join(directory, "result.json"), "w") as file:
                    json.dump({"layers": layers, "timing": result.timing.model_dump()}, file)
        metrics = {"step": trainers[0].step_number}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _load(trainer: Trainer, directory: str) -> None:
    from safetensors.torch import load_file

    trainer.load_state_dict(load_file(_weights(directory, "trainer", trainer.config.model.layer)))


def _weights(directory: str, kind: str, layer: int) -> str:
    return os.path.join(directory, f"{kind}-layer{layer}.safetensors")
