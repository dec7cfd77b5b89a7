"""One trainer process of Ray Train: the loop from activations to a finished transcoder.

A checkpoint holds each Trainer's state and where the data is (cluster.data_state). Every rank makes the same collective
calls in the same order: it may have fewer rows than the others, never another way through the loop. Where trainers
divide the transcoders (cluster.routing), a rank has Trainers of its own, which know of no other rank.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load, save

from cluster.accounts import Account, Figures, Journal, stream_timing
from cluster.batches import Batches, Share
from cluster.blocks import iterate_units
from cluster.data_state import data_state, position_files
from cluster.outcome import ANSWER_SECONDS, TrainingStopped, TrainResult, post_event, weights_file
from cluster.progress import RESUMED
from cluster.resources import Plan
from cluster.routing import Routing
from mtc.config import Member, RunConfig, SiteKey
from mtc.devices import open_device
from mtc.storage import Checkpoint, Checkpoints, CheckpointWriter
from mtc.telemetry import configure, set_run
from mtc.text import TokenStore, work_units
from mtc.training import CALIBRATION_ROWS, INITIAL_ROWS, Calibrator, Clock, SideBySide, StepResult, Trainer, on_device
from mtc.transcoder import agree, broadcast, gather

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
    routing = Routing(config, rank, world, device)
    with routing.alone():
        trainers = _open_trainers(routing.members, settings["d_model"], device, start.checkpoint)
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
        journal = Journal(log, config, routing, trainers, clock)
        while True:
            save = rank == 0 and due.now(lead.step_number) and not writer.busy
            share = batches.agree(lead.step_number >= total - 1, save)
            if share is None:
                break  # after `total` steps, fewer where tokens were dropped, a few more where units hold more
            if share.save and _all_may_save(trainers, writer, clock):
                with clock.part("checkpoint"):
                    kept = trainers if routing.writes else {}
                    writer.save(lead.step_number, files_of(kept, batches, data.generation, rank))
                    due.saved(lead.step_number)
            if lead.step_number == 0:
                _initialise(trainers, batches, routing)
            done = _step(together, batches, share, routing)
            account.step()
            journal.look(done)
            if lead.step_number % config.cluster.log_every_steps == 0 or lead.step_number in (1, total):
                _check_health(config, _write_down(account, journal, batches, done, rank))
                _check_dropped(config, batches, DROPPED_OF)
        _check_dropped(config, batches, 0)
        calibrated = _calibrate(trainers, batches, routing)
    _finish(trainers, batches, writer, data.generation, rank, calibrated, routing)


def files_of(
    trainers: Mapping[str, Trainer], batches: Batches, generation: int, rank: int
) -> dict[str, Callable[[], bytes]]:
    """This rank's part of a checkpoint, with these trainers: a snapshot of now, turned into bytes when it is
    written."""
    files = position_files(batches, generation, rank)
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
    members: Sequence[Member], d_model: int, device: torch.device, checkpoint: Checkpoint | None
) -> dict[str, Trainer]:
    """A Trainer for each of these transcoders by name, as the checkpoint left it or new."""
    trainers = {member.name: Trainer(member.config, d_model, d_model, device) for member in members}
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


def _initialise(trainers: Mapping[str, Trainer], batches: Batches, routing: Routing) -> None:
    """Set scales, encoders and biases by the first rows; called on all ranks at once."""
    with batches.clock.part("step"):
        first = routing.route(batches.buffer.peek(INITIAL_ROWS))
        with routing.alone():
            for trainer in trainers.values():
                source, target = _rows_of(trainer, first)
                neurons = None
                if trainer.config.transcoder.init == "mlp":
                    from mtc.language_model import read_neurons  # 4 s of CPU, which no other trainer needs

                    (sites,) = trainer.config.model.sites
                    neurons = read_neurons(trainer.config.model, sites.layer, sites.source)
                trainer.initialise(source, target, neurons)


def _step(together: SideBySide, batches: Batches, share: Share, routing: Routing) -> list[StepResult]:
    """One step of every trainer on its sites' rows of the same batch; called on all ranks at once."""
    taken = batches.take(share)
    with batches.clock.part("step"):
        rows = routing.route(taken, share.of_ranks)
        with routing.alone():
            return together.step([_rows_of(trainer, rows) for trainer in together.trainers], share.tokens)


def _write_down(
    account: Account, journal: Journal, batches: Batches, done: list[StepResult], rank: int
) -> list[Figures]:
    """Metrics and the account of time, told to the driver; returns every transcoder's. Called on all ranks at once."""
    batches.settle_waits()  # on every rank, so that spans on a GPU don't pile up
    figures = journal.read(done)
    spent = account.write()
    if rank == 0:
        journal.write(figures, spent)
    return figures


def _all_may_save(trainers: Mapping[str, Trainer], writer: CheckpointWriter, clock: Clock) -> bool:
    """Whether on every rank the newest step changed the weights and the last checkpoint is written; called on all at
    once."""
    may = all(trainer.healthy() for trainer in trainers.values()) and not writer.busy
    with clock.part("all_reduce"):
        (all_may,) = agree(may, op=dist.ReduceOp.MIN)
    return bool(all_may)


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


def _check_health(config: RunConfig, figures: Sequence[Figures]) -> None:
    """Go back to the last checkpoint after too many steps in a row that could not be made; the same on all ranks."""
    for member, (row, _, _) in zip(config.members(), figures, strict=True):
        in_a_row, limit = row.skipped_in_a_row, member.config.optimizer.max_skipped_steps
        if in_a_row >= limit:
            where = f"{member.name}: " if len(figures) > 1 else ""
            raise FloatingPointError(
                f"{where}{in_a_row} steps in a row up to step {row.step} had no finite gradient "
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


def _calibrate(trainers: Mapping[str, Trainer], batches: Batches, routing: Routing) -> int:
    """Set the threshold of every transcoder whose threshold is calibrated on what follows in the stream; returns how
    many tokens that was."""
    wanted = [t for t in trainers.values() if t.transcoder.activation.thresholds == "calibrated"]
    if not any(gather(bool(wanted))):
        return 0  # nor is there anything in the stream
    calibrators = [(Calibrator(trainer.transcoder), trainer) for trainer in wanted]
    for rows in routing.rounds(batches.calibration()):
        with batches.clock.part("step"), routing.alone():
            for calibrator, trainer in calibrators:
                parts = (part.split(CALIBRATION_ROWS) for part in _rows_of(trainer, rows))
                for source, target in zip(*parts, strict=True):
                    calibrator.add(trainer.calibrated_on(source, target))
    with batches.clock.part("step"):
        (calibrated,) = agree(batches.calibrated)
        if not calibrated:
            raise RuntimeError("the activation stream ended before the units for calibrating the threshold")
        with routing.alone():
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
    routing: Routing,
) -> None:
    """Write the last checkpoint, with the result; called on all ranks."""
    timing = stream_timing(batches)
    own = [
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
    results, kept = routing.gather(own), trainers if routing.writes else {}
    files = files_of(kept, batches, generation, rank)
    for name, trainer in kept.items():
        files[weights_file("transcoder", name)] = trainer.transcoder.to_bytes
    if rank == 0:
        result = {"members": [each._asdict() for each in results], "timing": timing.model_dump()}
        files["result.json"] = lambda: json.dumps(result).encode()
    writer.save(results[0].steps, files, result=True).result()
    writer.close()


def _to_safetensors(state: dict[str, Any]) -> bytes:
    return save(state)
