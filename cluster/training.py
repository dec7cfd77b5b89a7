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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.activations import activation_dataset, configure_data_context, iterate_units
from cluster.batches import Batches, Journal, Ledger, read_ledger, stream_timing
from cluster.resources import WORKER_ENVIRONMENT, Plan
from mtc.config import ConfigError, RunConfig
from mtc.runs import RunDirectory

if TYPE_CHECKING:
    import ray.data
    import ray.train

    from mtc.shuffle import ShuffleBuffer
    from mtc.timing import StreamTiming
    from mtc.training import Trainer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
FORMAT_FILE = "format.json"
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
    if last is not None:
        _check_format(last, run)
        if (result := _finished_training(last, run)) is not None:
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


def _check_format(checkpoint: ray.train.Checkpoint, run: RunDirectory) -> None:
    """Refuse what another version wrote: its units have other numbers."""
    found = None
    with checkpoint.as_directory() as directory:
        path = os.path.join(directory, FORMAT_FILE)
        if os.path.exists(path):
            with open(path) as file:
                found = json.load(file)["format_version"]
    if found != FORMAT_VERSION:
        raise ConfigError(
            f"output.run_id={run.run_id}: its checkpoint has format_version {found}, this version continues "
            f"{FORMAT_VERSION}; give another output.run_id"
        )


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
            finished = read_ledger(directory)
    units = work_units(TokenStore.open(store_url), config, plan.num_trainers)
    left = [(number, windows) for number, windows in enumerate(units) if number not in finished]
    logger.info("stream of %d work units, %d of %d trained before", len(left), len(finished), len(units))
    return activation_dataset(config, plan, store_url, left)


def _train_worker(settings: dict[str, Any]) -> None:
    """One rank. Every rank makes the same collective calls in the same order, whatever its shard holds."""
    import ray.train
    import ray.train.torch
    import torch

    from mtc.shuffle import ShuffleBuffer, on_device
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
    ledger = Ledger(rank)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            for trainer in trainers:
                _load(trainer, directory)
            ledger.restore(directory)
    clock = Clock()
    batch = config.optimizer.batch_tokens // world
    lead = trainers[0]
    with on_device(iterate_units(ray.train.get_dataset_shard("train")), device) as units:
        batches = Batches(units, buffer, batch, ledger, clock)
        journal = Journal(settings["log"], trainers, batches) if rank == 0 else None
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
            if lead.step_number % config.cluster.log_every_steps == 0 or lead.step_number == 1 or last:
                batches.settle_waits()  # on every rank, so that spans on a GPU don't pile up
                if journal:
                    journal.write(done)
            if lead.step_number % config.cluster.checkpoint_every_steps == 0 and not last:
                with clock.part("checkpoint"):
                    _report(trainers, buffer, ledger, rank)
        calibration = _calibrate(config, trainers, batches)
    timing = stream_timing(batches)
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


def _calibrate(config: RunConfig, trainers: list[Trainer], batches: Batches) -> int:
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


def _report(
    trainers: list[Trainer], buffer: ShuffleBuffer, ledger: Ledger, rank: int, result: Trained | None = None
) -> None:
    """Write a checkpoint; each rank adds its ledger, rank 0 the state. Called on all ranks at the same step."""
    import ray.train
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as directory:
        ledger.write(directory, buffer)
        if rank == 0:
            with open(os.path.join(directory, FORMAT_FILE), "w") as file:
                json.dump({"format_version": FORMAT_VERSION}, file)
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
