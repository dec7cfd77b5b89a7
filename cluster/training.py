"""The Ray Train job: data-parallel training on the activation stream, checkpoints, resume and calibration.

A checkpoint holds the Trainer's state and where the data is: which tokens of which work units are trained, and how far
the shuffle buffer's present chunk is used up. The stream is built anew at every start from what is left, so every token
is trained exactly once whatever died in between.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from cluster.activations import iterate_units
from cluster.progress import RESUMED, STOPPED, one_line
from cluster.resources import Plan
from cluster.resume import data_state, position_files, read_progress
from mtc.config import RunConfig
from mtc.runs import RunDirectory, RunError

if TYPE_CHECKING:
    from cluster.batches import Batches
    from mtc.checkpoints import Checkpoint, Checkpoints, CheckpointWriter
    from mtc.ledger import Progress
    from mtc.timing import StreamTiming
    from mtc.training import Trainer
    from mtc.work import Work

logger = logging.getLogger(__name__)

INITIAL_ROWS = 16_384  # tokens per rank from which scales and biases are set
DROPPED_OF = 100_000  # tokens, before a share of them says something
CALIBRATION_ROWS = 4096  # at a time, so that memory stays small
LONGEST_PAUSE = 60.0  # seconds before the job starts Ray Train again


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
    skipped_steps: int = 0
    """Steps without a finite gradient, which changed no weights."""


class Trained(NamedTuple):
    """What training leaves beside the weights."""

    layers: tuple[TrainResult, ...]
    """One for each entry of `model.sites`."""
    timing: StreamTiming
    """What waited on what."""
    progress: Progress
    """What was trained of each work unit."""


class TrainingStopped(RuntimeError):
    """The run cannot go on, and starting it again would not help; the message says why."""


def train(
    config: RunConfig,
    plan: Plan,
    run: RunDirectory,
    store_url: str,
    d_model: int,
    log: Any,
    go_on: Callable[[], None],
    work: Work,
) -> Trained:
    """Train, calibrate and write each layer's `transcoder.safetensors`; `log` is a MetricsLog actor's handle, and
    `go_on` raises what ends the whole run, once something does. `work` is what `work_units` gives.

    Continues from the run's last checkpoint if there is one. Ray Train starts dead trainers again, up to
    `cluster.max_failures` times; if it gives up although there was a new checkpoint in between, or if its controller
    dies, it is started again here. Raises ray.train.TrainingFailedError or ray.exceptions.RayActorError if that does
    not help either, TrainingStopped, also if the ledger does not have every token once, and RunError for checkpoints
    that cannot be used.
    """
    import ray.exceptions
    import ray.train

    from mtc.checkpoints import Checkpoints
    from mtc.tokens import TokenStore

    checkpoints = Checkpoints(run.url)
    tell = partial(_tell, log)
    failures, digest = 0, work.digest(TokenStore.open(store_url))
    last = checkpoints.latest_intact(lambda message: tell("checkpoint_damaged", message))
    if last is not None and last.manifest.work != digest:
        raise RunError(
            f"output.run_id={run.run_id}: its checkpoint was trained on other text than "
            f"data.name={config.data.name} gives now ({store_url}); give another output.run_id, or the old text"
        )
    groups = _placement_groups()
    while last is None or not last.is_result:
        before = last.manifest.step if last else 0
        if before:
            tell("continue", f"continues from the checkpoint of step {before:,}", before)
        try:
            _interruptible(_trainer(config, plan, run, store_url, d_model, log).fit, go_on)
            last = _wait_for_result(checkpoints)
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            _remove(_placement_groups() - groups)
            last = checkpoints.latest()
            progress = last is not None and last.manifest.step > before
            failures = 1 if progress else failures + 1
            tried_by_train = isinstance(error, ray.train.TrainingFailedError)
            if failures > config.cluster.max_failures or (tried_by_train and not progress):
                raise
            pause = min(2.0**failures, LONGEST_PAUSE)
            tell("restart", f"training is started again in {pause:.0f} s: {one_line(error)}")
            time.sleep(pause)
    trained = _result(last, run)
    check_ledger(trained.progress, len(work.training))
    return trained


def _trainer(config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, d_model: int, log: Any) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.stream import StreamConfig, TellFailures
    from mtc.distributed import backend

    fewest = min(config.cluster.min_trainers or plan.num_trainers, plan.num_trainers)
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": config, "plan": plan, "run_url": run.url, "run_id": run.run_id}
        | {"store_url": store_url, "d_model": d_model, "log": log},
        torch_config=TorchConfig(backend=backend(plan.device)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_trainers if fewest == plan.num_trainers else (fewest, plan.num_trainers),  # type: ignore[arg-type]
            use_gpu=plan.device == "cuda",
            resources_per_worker={"CPU": plan.trainer_cpus} | ({"GPU": plan.trainer_gpus} if plan.trainer_gpus else {}),
            placement_strategy="SPREAD" if plan.spread else "PACK",
            label_selector=plan.label_selector,  # type: ignore[call-arg]  # of Train v2, like what follows
        ),
        datasets={"train": _no_dataset},  # type: ignore[dict-item]
        dataset_config=StreamConfig(config, plan, run.url, store_url, d_model, log),
        run_config=ray.train.RunConfig(
            name=run.run_id,
            storage_path=os.path.join(tempfile.gettempdir(), "ray-train"),  # only a marker lies there
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[TellFailures(log)],  # type: ignore[list-item]
            worker_runtime_env=plan.runtime_env,  # type: ignore[call-arg]  # of Train v2
        ),
    )


def _placement_groups() -> set[str]:
    """Ids of this job's."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()  # ends the id
    return {
        name for name, group in placement_group_table().items() if group["state"] != "REMOVED" and name.endswith(job)
    }


def _remove(groups: set[str]) -> None:
    """Give their CPUs and GPUs back. Where the Train controller dies together with its helper that should do this, they
    would stay reserved until the job ends."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _no_dataset() -> None:
    """StreamConfig makes the Dataset, since it knows how many trainers there are."""


def _wait_for_result(checkpoints: Checkpoints) -> Checkpoint:
    """What the trainers ended with; another node may have written it."""
    from mtc.checkpoints import LISTING_SECONDS

    deadline = time.monotonic() + LISTING_SECONDS
    while (last := checkpoints.latest()) is None or not last.is_result:
        if time.monotonic() > deadline:
            raise RunError(
                f"{checkpoints.url}: the trainers ended, but the checkpoint with their result is not visible here "
                f"after {LISTING_SECONDS:.0f} s; submit the job again"
            )
        time.sleep(0.5)
    return last


def _result(checkpoint: Checkpoint, run: RunDirectory) -> Trained:
    """The result in the last checkpoint, its weights and ledger copied into the run."""
    from mtc.ledger import to_parquet
    from mtc.timing import StreamTiming

    result = json.loads(checkpoint.read("result.json"))
    layers = tuple(TrainResult(**layer) for layer in result["layers"])
    for layer in layers:
        run.for_layer(layer.layer).write("transcoder.safetensors", checkpoint.read(_weights("transcoder", layer.layer)))
    progress = read_progress(checkpoint)
    for layer in layers:
        run.for_layer(layer.layer).write("ledger.parquet", to_parquet(progress.table))
    return Trained(layers, StreamTiming(**result["timing"]), progress)


def check_ledger(progress: Progress, units: int) -> None:
    """Raises TrainingStopped unless every token of the training units 0 to `units` - 1 was trained exactly once."""
    wrong = progress.wrong_units().tolist()
    missing = sorted(set(range(units)) - set(progress.finished().tolist()))
    if wrong or missing:
        raise TrainingStopped(
            f"the ledger of trained tokens is wrong, and so may be the transcoder: of {units} work units "
            f"{len(missing)} are not finished ({missing[:5]}...) and {len(wrong)} have tokens more than once "
            f"({wrong[:5]}...)"
        )


def _tell(log: Any, kind: str, message: str, step: int | None = None) -> Any:
    return log.event.remote(kind, message, step)


def _interruptible(call: Callable[[], Any], go_on: Callable[[], None]) -> None:
    """`call()` in a thread of its own, so that Ctrl-C and SIGTERM reach this one as KeyboardInterrupt, and so that
    `go_on` is called meanwhile; what either raises is raised here.

    In the main thread Train would install its own SIGINT handler, which ends the process with exit code 1.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            call()
            outcome.put(None)
        except BaseException as error:  # handed to the waiting thread, which raises it
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    while True:
        with suppress(queue.Empty):
            error = outcome.get(timeout=1.0)
            break
        go_on()
    if error is not None:
        for _ in range(3):  # a trainer that wants the run to end says so before it dies
            go_on()
            time.sleep(1.0)
        raise error


class _Start(NamedTuple):
    """What a rank continues from."""

    checkpoint: Checkpoint | None
    number: int
    """Of this start; the same on all ranks."""


def _train_worker(settings: dict[str, Any]) -> None:
    """One rank. Every rank makes the same collective calls in the same order, whatever its shard holds."""
    import ray.train
    import ray.train.torch
    import torch

    from cluster.batches import Account, Batches, Journal
    from cluster.metrics import RayMeter
    from mtc.checkpoints import Checkpoints, CheckpointWriter
    from mtc.devices import open_device
    from mtc.logs import configure, set_run
    from mtc.metrics import PROCESS
    from mtc.shuffle import on_device
    from mtc.timing import Clock
    from mtc.tokens import TokenStore
    from mtc.training import Trainer
    from mtc.work import work_units

    configure()
    set_run(settings["run_id"])
    config, plan, log = settings["config"], settings["plan"], settings["log"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(plan.trainer_threads)
    device = open_device(plan.device)
    if device.type == "cuda":
        device = ray.train.torch.get_device()  # which of those that it sees
    d_model = settings["d_model"]
    tell = partial(_tell, log)
    checkpoints = Checkpoints(settings["run_url"])
    start = _agree_on_start(checkpoints, rank, log)
    if start.checkpoint is not None and start.checkpoint.is_result:
        return  # another trainer died after the last checkpoint was complete
    trainers = [Trainer(alone, d_model, d_model, device) for alone in config.for_layers()]
    if start.checkpoint is not None:
        for trainer in trainers:
            _load(trainer, start.checkpoint)
    data = data_state(config, start.checkpoint, rank, world, device)
    lead, total = trainers[0], config.total_steps
    if rank == 0 and start.checkpoint is not None:
        tell(
            RESUMED,
            f"on {world} trainer{'s' * (world > 1)} after the checkpoint of step {lead.step_number:,}"
            f" ({data.run_again:,} trained tokens run through the language model again)",
            lead.step_number,
        )
    store = TokenStore.open(settings["store_url"])
    work = work_units(store, config)
    keep, patience = config.cluster.keep_checkpoints, config.cluster.storage_seconds
    digest = work.digest(store)
    writer = CheckpointWriter(checkpoints, start.number, rank, world, keep, tell, patience, digest)
    clock = Clock()
    due = _Due(config, lead.step_number)
    name = start.checkpoint.name if start.checkpoint else ""
    with on_device(iterate_units(ray.train.get_dataset_shard("train"), name), device) as units:
        batches = Batches(
            units, data.buffer, config.optimizer.batch_tokens, data.ledger, clock, len(work.training), data.filters
        )
        account = Account(log, RayMeter(PROCESS, run_id=settings["run_id"]), rank, batches)
        journal = Journal(log, trainers, clock) if rank == 0 else None
        nothing = (torch.empty(0, d_model, device=device),) * (2 * len(trainers))
        while lead.step_number < total:
            save = rank == 0 and due.now(lead.step_number) and not writer.busy
            save = save and all(trainer.healthy() for trainer in trainers)
            share = batches.agree(lead.step_number == total - 1, save)
            if share is None:
                break  # tokens were dropped, so there are fewer steps
            if share.save:
                with clock.part("checkpoint"):
                    writer.save(lead.step_number, files_of(trainers, batches, data.generation, rank))
                    due.saved(lead.step_number)
            if lead.step_number == 0:
                with clock.part("step"):
                    rows = [column[:INITIAL_ROWS] for column in data.buffer.peek() or nothing]
                    for trainer, source, target in zip(trainers, rows[::2], rows[1::2], strict=True):
                        trainer.initialise(source, target)
            columns = batches.take(share) or nothing
            with clock.part("step"):
                done = [
                    trainer.step(source, target, share.tokens)
                    for trainer, source, target in zip(trainers, columns[::2], columns[1::2], strict=True)
                ]
            account.step()
            if journal:
                journal.look(done)
            last = lead.step_number == total
            if lead.step_number % config.cluster.log_every_steps == 0 or lead.step_number == 1 or last:
                batches.settle_waits()  # on every rank, so that spans on a GPU don't pile up
                metrics = journal.read(done) if journal else []
                spent = account.write()
                if journal:
                    journal.write(metrics, spent)
                _check_health(config, trainers)
                _check_dropped(config, batches, tell, DROPPED_OF)
        _check_dropped(config, batches, tell, 0)
        calibrated = _calibrate(trainers, batches)
    _finish(config, trainers, batches, writer, data.generation, rank, calibrated)


def _agree_on_start(checkpoints: Checkpoints, rank: int, log: Any) -> _Start:
    """Rank 0 chooses the checkpoint and a number for this start; the others and the stream follow."""
    import ray
    import torch
    import torch.distributed as dist

    from mtc.distributed import distributed

    chosen = torch.zeros(65, dtype=torch.uint8)
    checkpoint = None
    if rank == 0:
        checkpoint = checkpoints.latest_intact(lambda message: _tell(log, "checkpoint_damaged", message))
        name = checkpoint.name if checkpoint else ""
        ray.get(log.choose.remote(name))
        chosen = torch.tensor([*os.urandom(4), *name.encode().ljust(61)], dtype=torch.uint8)
    if distributed():
        dist.broadcast(chosen, 0)
        name = bytes(chosen[4:].tolist()).decode().strip()
        if rank and name:
            checkpoint = checkpoints.wait_for(name)
    return _Start(checkpoint, int.from_bytes(chosen[:4].tolist()))


class _Due:
    """When a checkpoint is due."""

    def __init__(self, config: RunConfig, step: int):
        self.settings, self.step, self.at = config.cluster, step, time.monotonic()

    def now(self, step: int) -> bool:
        if step == self.step:
            return False
        seconds = time.monotonic() - self.at
        many = step - self.step >= self.settings.checkpoint_every_steps
        return many or seconds >= self.settings.checkpoint_every_seconds

    def saved(self, step: int) -> None:
        self.step, self.at = step, time.monotonic()


def _check_health(config: RunConfig, trainers: list[Trainer]) -> None:
    """Go back to the last checkpoint after too many steps in a row that could not be made; the same on all ranks."""
    for trainer in trainers:
        in_a_row = int(trainer.skipped[1])
        if in_a_row >= config.optimizer.max_skipped_steps:
            raise FloatingPointError(
                f"{in_a_row} steps in a row up to step {trainer.step_number} had no finite gradient "
                f"(optimizer.max_skipped_steps={config.optimizer.max_skipped_steps}): "
                "back to the last checkpoint; if it happens again, lower optimizer.lr"
            )


def _check_dropped(config: RunConfig, batches: Batches, tell: Callable[..., Any], least: int) -> None:
    """Stop when the language model gave too many activations that are not finite, of `least` tokens or more; called on
    all ranks at once."""
    import ray

    from mtc.distributed import agree

    ledger = batches.ledger
    with batches.clock.part("all_reduce"):
        dropped, received = (int(n) for n in agree(ledger.dropped_tokens, ledger.received_tokens))
    if received >= least and dropped > config.data.max_skipped_share * received:
        reason = (
            f"data.max_skipped_share={config.data.max_skipped_share}: {dropped} of {received} tokens have activations "
            f"that are not finite ({dropped / received:.1%}), in {config.model.name} with "
            f"model.dtype={config.model.dtype}"
        )
        ray.get(tell(STOPPED, reason))  # Ray Train would start the trainers again
        raise TrainingStopped(reason)


def _calibrate(trainers: list[Trainer], batches: Batches) -> int:
    """Set every transcoder's threshold on what follows in the stream; returns how many tokens that was."""
    from mtc.distributed import agree
    from mtc.training import Calibrator

    calibrators = [Calibrator(trainer.transcoder) for trainer in trainers]
    for unit in batches.calibration():
        with batches.clock.part("step"):
            for calibrator, source in zip(calibrators, unit.columns[::2], strict=True):
                for rows in source.split(CALIBRATION_ROWS):
                    calibrator.add(rows)
    with batches.clock.part("step"):
        (calibrated,) = agree(batches.calibrated)
        if not calibrated:
            raise RuntimeError("the activation stream ended before the units for calibrating the threshold")
        for calibrator in calibrators:
            calibrator.finish()
    return int(calibrated)


def files_of(trainers: list[Trainer], batches: Batches, generation: int, rank: int) -> dict[str, Callable[[], bytes]]:
    """This rank's part of a checkpoint: a snapshot of now, turned into bytes when it is written."""
    files = position_files(batches, generation, rank)
    if rank == 0:
        for trainer in trainers:
            files[_weights("trainer", trainer.config.model.layer)] = partial(_to_safetensors, trainer.state_dict())
    return files


def _finish(
    config: RunConfig,
    trainers: list[Trainer],
    batches: Batches,
    writer: CheckpointWriter,
    generation: int,
    rank: int,
    calibrated: int,
) -> None:
    """Write the last checkpoint, with the result; called on all ranks."""
    from cluster.batches import stream_timing

    timing = stream_timing(batches)
    results = [
        TrainResult(
            sites.layer,
            trainer.step_number,
            trainer.tokens,
            float(trainer.transcoder.threshold),
            calibrated,
            "bfloat16" if trainer.compute and trainer.compute.bfloat16 else "float32",
            trainer.describe_compute(),
            int(trainer.skipped[0]),
        )
        for sites, trainer in zip(config.model.sites, trainers, strict=True)
    ]
    files = files_of(trainers, batches, generation, rank)
    if rank == 0:
        for trainer in trainers:
            files[_weights("transcoder", trainer.config.model.layer)] = trainer.transcoder.to_bytes
        result = {"layers": [layer._asdict() for layer in results], "timing": timing.model_dump()}
        files["result.json"] = lambda: json.dumps(result).encode()
    writer.save(trainers[0].step_number, files, result=True).result()
    writer.close()


def _to_safetensors(state: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(state)


def _load(trainer: Trainer, checkpoint: Checkpoint) -> None:
    from safetensors.torch import load

    trainer.load_state_dict(load(checkpoint.read(_weights("trainer", trainer.config.model.layer))))


def _weights(kind: str, layer: int) -> str:
    return f"{kind}-layer{layer}.safetensors"
