"""One trainer process of Ray Train: the loop from activations to a finished transcoder.

A checkpoint holds each Trainer's state and where the data is (cluster.data_state). Every rank makes the same collective
calls in the same order: it may have fewer rows than the others, never another way through the loop.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load, save

from cluster.accounts import Account, Journal, stream_timing
from cluster.batches import Batches, Share
from cluster.blocks import iterate_units
from cluster.data_state import data_state, position_files
from cluster.outcome import ANSWER_SECONDS, TrainingStopped, TrainResult, post_event, weights_file
from cluster.progress import RESUMED
from cluster.resources import Plan
from mtc.config import RunConfig, SiteKey
from mtc.devices import open_device
from mtc.storage import Checkpoint, Checkpoints, CheckpointWriter
from mtc.telemetry import configure, set_run
from mtc.text import TokenStore, work_units
from mtc.training import CALIBRATION_ROWS, INITIAL_ROWS, Calibrator, Clock, SideBySide, StepResult, Trainer, on_device
from mtc.transcoder import agree, broadcast

DROPPED_OF = 100_000  # tokens, before a share of them says something


def train_worker(settings: dict[str, Any]) -> None:
    """One rank of the training, from its first batch to the finished weights. Every rank makes the same collective
    calls in the same order, whatever its shard holds."""
    configure()
    set_run(settings["run_id"])
    config, log = settings["config"], settings["log"]
    rank, world, device = _take_place(settings["plan"])
    tell = partial(post_event, log)
    checkpoints = Checkpoints(settings["run_url"])
    start = _agree_on_start(checkpoints, rank, log)
    if start.checkpoint is not None and start.checkpoint.is_result:
        return  # another trainer died after the last checkpoint was complete
    trainers = _open_trainers(config, settings["d_model"], device, start.checkpoint)
    together = SideBySide(list(trainers.values()))
    lead, total = next(iter(trainers.values())), config.total_steps
    data = data_state(config, start.checkpoint, rank, world, device)
    if rank == 0 and start.checkpoint is not None:
        _tell_resumed(tell, lead.step_number, world, data.run_again)
    store = TokenStore.open(settings["store_url"])
    work = work_units(store, config)
    writer = _open_writer(checkpoints, start.number, rank, world, config, tell, work.digest(store))
    due = _Due(config, lead.step_number)
    shard = ray.train.get_dataset_shard("train")
    with on_device(iterate_units(shard, start.checkpoint.name if start.checkpoint else ""), device) as units:
        batch, clock = config.optimizer.batch_tokens, Clock()
        batches = Batches(units, data.buffer, batch, data.ledger, clock, len(work.training), data.filters)
        account = Account(log, settings["run_id"], rank, batches)
        journal = Journal(log, trainers, clock) if rank == 0 else None
        while True:
            save = rank == 0 and due.now(lead.step_number) and not writer.busy
            save = save and all(trainer.healthy() for trainer in trainers.values())
            share = batches.agree(lead.step_number >= total - 1, save)
            if share is None:
                break  # after `total` steps, fewer where tokens were dropped, a few more where units hold more
            if share.save:
                with clock.part("checkpoint"):
                    writer.save(lead.step_number, files_of(trainers, batches, data.generation, rank))
                    due.saved(lead.step_number)
            if lead.step_number == 0:
                _initialise(trainers, batches)
            done = _step(together, batches, share)
            account.step()
            if journal:
                journal.look(done)
            if lead.step_number % config.cluster.log_every_steps == 0 or lead.step_number in (1, total):
                _write_down(account, journal, batches, done)
                _check_health(trainers)
                _check_dropped(config, batches, DROPPED_OF)
        _check_dropped(config, batches, 0)
        calibrated = _calibrate(trainers, batches)
    _finish(trainers, batches, writer, data.generation, rank, calibrated)


def files_of(
    trainers: Mapping[str, Trainer], batches: Batches, generation: int, rank: int
) -> dict[str, Callable[[], bytes]]:
    """This rank's part of a checkpoint: a snapshot of now, turned into bytes when it is written."""
    files = position_files(batches, generation, rank)
    if rank == 0:
        for name, trainer in trainers.items():
            files[weights_file("trainer", name)] = partial(_to_safetensors, trainer.state_dict())
    return files


class _Start(NamedTuple):
    """The checkpoint that a rank continues from, and the number of this start."""

    checkpoint: Checkpoint | None
    """The newest intact checkpoint; None for a run that begins."""
    number: int
    """Number that names this start among the run's; the same on all ranks."""


def _take_place(plan: Plan) -> tuple[int, int, torch.device]:
    """This process's rank, the number of ranks, and the device that it computes on."""
    torch.set_num_threads(plan.trainer_threads)
    context = ray.train.get_context()
    device = open_device(plan.device)
    if device.type == "cuda":
        device = ray.train.torch.get_device()  # which of those that it sees
    return context.get_world_rank(), context.get_world_size(), device


def _open_trainers(
    config: RunConfig, d_model: int, device: torch.device, checkpoint: Checkpoint | None
) -> dict[str, Trainer]:
    """A Trainer for each of the run's transcoders by name, as the checkpoint left it or new."""
    trainers = {member.name: Trainer(member.config, d_model, d_model, device) for member in config.members()}
    if checkpoint is not None:
        for name, trainer in trainers.items():
            trainer.load_state_dict(load(checkpoint.read(weights_file("trainer", name))))
    return trainers


def _open_writer(
    checkpoints: Checkpoints, start: int, rank: int, world: int, config: RunConfig, tell: Callable[..., Any], work: str
) -> CheckpointWriter:
    keep, patience = config.cluster.keep_checkpoints, config.cluster.storage_seconds
    return CheckpointWriter(checkpoints, start, rank, world, keep, tell, patience, work)


def _tell_resumed(tell: Callable[..., Any], step: int, world: int, run_again: int) -> None:
    tell(
        RESUMED,
        f"on {world} trainer{'s' * (world > 1)} after the checkpoint of step {step:,}"
        f" ({run_again:,} trained tokens run through the language model again)",
        step,
    )


def _rows_of(trainer: Trainer, activations: Mapping[SiteKey, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target of a trainer's sites, [rows, d] each; no rows for a rank that never got a unit."""
    (sites,) = trainer.config.model.sites
    if not activations:
        weights = trainer.transcoder
        return weights.W_enc.new_empty(0, weights.W_enc.shape[1]), weights.W_dec.new_empty(0, weights.W_dec.shape[1])
    return activations[sites.source_key], activations[sites.target_key]


def _initialise(trainers: Mapping[str, Trainer], batches: Batches) -> None:
    """Set scales, encoders and biases by the first rows; called on all ranks at once."""
    with batches.clock.part("step"):
        first = batches.buffer.peek(INITIAL_ROWS)
        for trainer in trainers.values():
            source, target = _rows_of(trainer, first)
            neurons = None
            if trainer.config.transcoder.init == "mlp":
                from mtc.language_model import read_neurons  # 4 s of CPU, which no other trainer needs

                (sites,) = trainer.config.model.sites
                neurons = read_neurons(trainer.config.model, sites.layer, sites.source)
            trainer.initialise(source, target, neurons)


def _step(together: SideBySide, batches: Batches, share: Share) -> list[StepResult]:
    """One step of every trainer on its sites' rows of the same batch; called on all ranks at once."""
    taken = batches.take(share)
    with batches.clock.part("step"):
        return together.step([_rows_of(trainer, taken) for trainer in together.trainers], share.tokens)


def _write_down(account: Account, journal: Journal | None, batches: Batches, done: list[StepResult]) -> None:
    """Metrics and the account of time, told to the driver; called on all ranks at once."""
    batches.settle_waits()  # on every rank, so that spans on a GPU don't pile up
    metrics = journal.read(done) if journal else []
    spent = account.write()
    if journal:
        journal.write(metrics, spent)


def _agree_on_start(checkpoints: Checkpoints, rank: int, log: Any) -> _Start:
    """Rank 0 chooses the checkpoint and a number for this start; the others and the stream follow."""
    checkpoint, name, number = None, "", 0
    if rank == 0:
        checkpoint = checkpoints.latest_intact(lambda message: post_event(log, "checkpoint_damaged", message))
        name, number = checkpoint.name if checkpoint else "", secrets.randbits(32)
        ray.get(log.choose.remote(name), timeout=ANSWER_SECONDS)
    name, number = broadcast(name, number)
    if rank and name:
        checkpoint = checkpoints.wait_for(name)
    return _Start(checkpoint, number)


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


def _check_health(trainers: Mapping[str, Trainer]) -> None:
    """Go back to the last checkpoint after too many steps in a row that could not be made; the same on all ranks."""
    for name, trainer in trainers.items():
        in_a_row, limit = int(trainer.skipped[1]), trainer.config.optimizer.max_skipped_steps
        if in_a_row >= limit:
            where = f"{name}: " if len(trainers) > 1 else ""
            raise FloatingPointError(
                f"{where}{in_a_row} steps in a row up to step {trainer.step_number} had no finite gradient "
                f"(optimizer.max_skipped_steps={limit}): "
                "back to the last checkpoint; if it happens again, lower optimizer.lr"
            )


def _check_dropped(config: RunConfig, batches: Batches, least: int) -> None:
    """Stop when the language model gave too many activations that are not finite, of `least` tokens or more; called on
    all ranks at once."""
    ledger = batches.ledger
    with batches.clock.part("all_reduce"):
        dropped, received = (int(n) for n in agree(ledger.dropped_tokens, ledger.received_tokens))
    if received >= least and dropped > config.data.max_skipped_share * received:
        reason = (
            f"data.max_skipped_share={config.data.max_skipped_share}: {dropped} of {received} tokens have activations "
            f"that are not finite ({dropped / received:.1%}), in {config.model.name} with "
            f"model.dtype={config.model.dtype}"
        )
        raise TrainingStopped(reason)


def _calibrate(trainers: Mapping[str, Trainer], batches: Batches) -> int:
    """Set the threshold of every transcoder whose threshold is calibrated on what follows in the stream; returns how
    many tokens that was."""
    wanted = [t for t in trainers.values() if t.transcoder.activation.thresholds == "calibrated"]
    if not wanted:
        return 0  # nor is there anything in the stream
    calibrators = [(Calibrator(trainer.transcoder), trainer) for trainer in wanted]
    for unit in batches.calibration():
        with batches.clock.part("step"):
            for calibrator, trainer in calibrators:
                (sites,) = trainer.config.model.sites
                parts = (unit.activations[key].split(CALIBRATION_ROWS) for key in (sites.source_key, sites.target_key))
                for source, target in zip(*parts, strict=True):
                    calibrator.add(trainer.calibrated_on(source, target))
    with batches.clock.part("step"):
        (calibrated,) = agree(batches.calibrated)
        if not calibrated:
            raise RuntimeError("the activation stream ended before the units for calibrating the threshold")
        for calibrator, _ in calibrators:
            calibrator.finish()
    return int(calibrated)


def _finish(
    trainers: Mapping[str, Trainer],
    batches: Batches,
    writer: CheckpointWriter,
    generation: int,
    rank: int,
    calibrated: int,
) -> None:
    """Write the last checkpoint, with the result; called on all ranks."""
    timing = stream_timing(batches)
    results = [
        TrainResult(
            name,
            trainer.config.model.layer,
            trainer.step_number,
            trainer.tokens,
            float(trainer.transcoder.threshold.detach().median()),
            calibrated if trainer.transcoder.activation.thresholds == "calibrated" else 0,
            "bfloat16" if trainer.compute and trainer.compute.bfloat16 else "float32",
            trainer.describe_compute(),
            int(trainer.skipped[0]),
        )
        for name, trainer in trainers.items()
    ]
    files = files_of(trainers, batches, generation, rank)
    if rank == 0:
        for name, trainer in trainers.items():
            files[weights_file("transcoder", name)] = trainer.transcoder.to_bytes
        result = {"members": [each._asdict() for each in results], "timing": timing.model_dump()}
        files["result.json"] = lambda: json.dumps(result).encode()
    writer.save(results[0].steps, files, result=True).result()
    writer.close()


def _to_safetensors(state: dict[str, Any]) -> bytes:
    return save(state)
