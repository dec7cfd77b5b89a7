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

from cluster.activations import activation_dataset, configure_data_context, iterate_units
from cluster.resources import WORKER_ENVIRONMENT, Plan
from mtc.config import RunConfig
from mtc.runs import RunDirectory

if TYPE_CHECKING:
    import ray.data
    import ray.train

    from mtc.training import ShuffleBuffer, Trainer

logger = logging.getLogger(__name__)

INITIAL_ROWS = 16_384  # tokens per rank from which scales and biases are set


class TrainResult(NamedTuple):
    """What the trainers report at the end."""

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


def train(config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, d_model: int, log: Any) -> TrainResult:
    """Train, calibrate and write `transcoder.safetensors` into the run; `log` is a MetricsLog actor's handle.

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


def _finished_training(checkpoint: ray.train.Checkpoint, run: RunDirectory) -> TrainResult | None:
    """The result in a checkpoint, its weights copied into the run; None while training is not at its end."""
    with checkpoint.as_directory() as directory:
        if not os.path.exists(os.path.join(directory, "result.json")):
            return None
        with open(os.path.join(directory, "transcoder.safetensors"), "rb") as weights:
            run.write("transcoder.safetensors", weights.read())
        with open(os.path.join(directory, "result.json")) as file:
            return TrainResult(**json.load(file))


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

    from mtc.tokens import TokenStore, work_units

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
    import torch.distributed as dist

    from mtc.training import Calibrator, ShuffleBuffer, Trainer

    config, plan, log = settings["config"], settings["plan"], settings["log"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan.trainer_threads)
    device = ray.train.torch.get_device()
    trainer = Trainer(config, settings["d_model"], settings["d_model"], device)
    buffer = ShuffleBuffer(config.data.shuffle_buffer_tokens // world, config.data.seed * world + rank)
    ledger = _Ledger(rank)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            _load(trainer, directory)
            ledger.restore(directory)
    batch = config.optimizer.batch_tokens // world
    ready = _moments_with_a_batch(ray.train.get_dataset_shard("train"), buffer, batch, ledger)

    def all_ready() -> bool:
        here = next(ready, False)
        if world == 1:
            return here
        flag = torch.tensor(int(here), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    clock = time.perf_counter()  # of the last logged row
    logged_tokens = trainer.tokens
    while trainer.step_number < config.total_steps:
        if not all_ready():
            raise RuntimeError(
                f"the activation stream ended at step {trainer.step_number} of {config.total_steps}: "
                "work units were lost or hold fewer tokens than the token store says"
            )
        if trainer.step_number == 0:
            trainer.initialise(*(rows[:INITIAL_ROWS] for rows in buffer.peek()))
            clock = time.perf_counter()
        done = trainer.step(*buffer.take(batch))
        last = done.step == config.total_steps
        if rank == 0 and (done.step % config.cluster.log_every_steps == 0 or done.step == 1 or last):
            metrics = done.metrics()  # waits for the device
            now = time.perf_counter()
            speed = (metrics.tokens - logged_tokens) / (now - clock)
            clock, logged_tokens = now, metrics.tokens
            log.append.remote(metrics._asdict() | {"tokens_per_second": speed})
        if done.step % config.cluster.checkpoint_every_steps == 0 and not last:
            _report(trainer, buffer, ledger, rank)

    calibrator = Calibrator(trainer.transcoder)
    wanted = -(-config.transcoder.calibration_tokens // config.optimizer.batch_tokens)
    calibrated = 0
    while calibrated < wanted and all_ready():
        calibrator.add(buffer.take(batch)[0])
        calibrated += 1
    if not calibrated:
        raise RuntimeError("the activation stream ended before a single batch for calibrating the threshold")
    threshold = calibrator.finish()
    assert trainer.compute is not None
    result = TrainResult(
        trainer.step_number,
        trainer.tokens,
        threshold,
        calibrated * config.optimizer.batch_tokens,
        "bfloat16" if trainer.compute.bfloat16 else "float32",
        trainer.describe_compute(),
    )
    _report(trainer, buffer, ledger, rank, result)


def _moments_with_a_batch(shard: Any, buffer: ShuffleBuffer, batch: int, ledger: _Ledger) -> Iterator[bool]:
    """Fill the buffer from the stream; yields True whenever a batch can be taken, until both are empty."""
    for unit, source, target in iterate_units(shard):
        buffer.add(source, target, unit)
        ledger.seen.add(unit)
        while buffer.ready(batch):
            yield True
    while buffer.size >= batch:
        yield True


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
    trainer: Trainer, buffer: ShuffleBuffer, ledger: _Ledger, rank: int, result: TrainResult | None = None
) -> None:
    """Write a checkpoint; each rank adds its ledger, rank 0 the state. Called on all ranks at the same step."""
    import ray.train
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as directory:
        ledger.write(directory, buffer)
        if rank == 0:
            save_file(trainer.state_dict(), os.path.join(directory, "trainer.safetensors"))
            if result is not None:
                with open(os.path.join(directory, "transcoder.safetensors"), "wb") as weights:
                    weights.write(trainer.transcoder.to_bytes())
                with open(os.path.join(directory, "result.json"), "w") as file:
                    json.dump(result._asdict(), file)
        ray.train.report({"step": trainer.step_number}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _load(trainer: Trainer, directory: str) -> None:
    from safetensors.torch import load_file

    trainer.load_state_dict(load_file(os.path.join(directory, "trainer.safetensors")))
