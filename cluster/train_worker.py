"""One trainer process of Ray Train: the loop from activations to a finished transcoder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from cluster.accounts import Account, Journal, stream_timing
from cluster.batches import Batches
from cluster.blocks import iterate_units
from cluster.data_state import data_state, position_files
from cluster.outcome import TrainingStopped, TrainResult, post_event, weights_file
from cluster.progress import RESUMED, STOPPED
from mtc.config import RunConfig
from mtc.devices import open_device
from mtc.storage import Checkpoint, Checkpoints, CheckpointWriter
from mtc.telemetry import configure, set_run
from mtc.text import TokenStore, work_units
from mtc.training import Calibrator, Clock, Trainer, on_device
from mtc.transcoder import agree
from mtc.transcoder.distributed import distributed

INITIAL_ROWS = 16_384  # tokens per rank from which scales and biases are set
DROPPED_OF = 100_000  # tokens, before a share of them says something
CALIBRATION_ROWS = 4096  # at a time, so that memory stays small


class _Start(NamedTuple):
    """What a rank continues from."""

    checkpoint: Checkpoint | None
    number: int
    """Of this start; the same on all ranks."""


def train_worker(settings: dict[str, Any]) -> None:
    """One rank. Every rank makes the same collective calls in the same order, whatever its shard holds."""
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
    tell = partial(post_event, log)
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
        account = Account(log, settings["run_id"], rank, batches)
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
    chosen = torch.zeros(65, dtype=torch.uint8)
    checkpoint = None
    if rank == 0:
        checkpoint = checkpoints.latest_intact(lambda message: post_event(log, "checkpoint_damaged", message))
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
            files[weights_file("trainer", trainer.config.model.layer)] = partial(_to_safetensors, trainer.state_dict())
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
            files[weights_file("transcoder", trainer.config.model.layer)] = trainer.transcoder.to_bytes
        result = {"layers": [layer._asdict() for layer in results], "timing": timing.model_dump()}
        files["result.json"] = lambda: json.dumps(result).encode()
    writer.save(trainers[0].step_number, files, result=True).result()
    writer.close()


def _to_safetensors(state: dict[str, Any]) -> bytes:
    return save(state)


def _load(trainer: Trainer, checkpoint: Checkpoint) -> None:
    trainer.load_state_dict(load(checkpoint.read(weights_file("trainer", trainer.config.model.layer))))
