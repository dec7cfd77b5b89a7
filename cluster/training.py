"""The Ray Train job as the driver runs it: it starts the trainers, again where that helps, and collects their result.

What one trainer does is cluster.train_worker; which units it gets at a start, cluster.stream. A checkpoint says which
tokens are trained, and the stream is built anew at every start from what is left, so every token is trained exactly
once whatever died in between.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.outcome import Trained, TrainResult, check_ledger, permanent_cause, post_event, weights_file
from cluster.resources import Plan
from cluster.resume import read_progress
from cluster.room import PlacementWatch, own_placement_groups
from cluster.stream import StreamConfig, TellFailures
from cluster.train_worker import train_worker
from mtc.config import RunConfig
from mtc.errors import MtcError, one_line
from mtc.results import StreamTiming
from mtc.storage import (
    LISTING_SECONDS,
    Checkpoint,
    Checkpoints,
    NotVisibleError,
    RunDirectory,
    RunError,
    progress_to_parquet,
)
from mtc.text import TokenStore, Work
from mtc.transcoder import backend

logger = logging.getLogger(__name__)
LONGEST_PAUSE = 60.0  # seconds before the job starts Ray Train again


class TrainingFailed(MtcError):
    """The trainers died more often than `cluster.max_failures` allows; the message says why they did at last."""

    exit_code = 1
    event = "failed"


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
    """Train, calibrate and write each transcoder's `transcoder.safetensors`; `log` is a MetricsLog actor's handle, and
    `go_on` raises what ends the whole run, once something does. `work` is what `work_units` gives.

    Continues from the run's last checkpoint if there is one. Ray Train starts dead trainers again, up to
    `cluster.max_failures` times; if it gives up although there was a new checkpoint in between, or if its controller
    dies, it is started again here. Raises TrainingFailed if that does not help either, at once the permanent error of a
    trainer or a model actor, TrainingStopped also if the ledger does not have every token `data.replays` times, and
    RunError for checkpoints that cannot be used.
    """
    checkpoints = Checkpoints(run.url)
    tell = partial(post_event, log)
    failures, digest = 0, work.digest(TokenStore.open(store_url))
    last = checkpoints.latest_intact(lambda message: tell("checkpoint_damaged", message))
    if last is not None and last.manifest.work != digest:
        raise RunError(
            f"output.run_id={run.run_id}: its checkpoint was trained on other text than "
            f"data.name={config.data.name} gives now ({store_url}), or in the order of an earlier version; give "
            "another output.run_id, or the old text and version"
        )
    groups = set(own_placement_groups())
    watch = PlacementWatch(plan, config.cluster.room_seconds)

    def look() -> None:
        go_on()
        watch.look()

    while last is None or not last.is_result:
        before = last.manifest.step if last else 0
        if before:
            tell("continue", f"continues from the checkpoint of step {before:,}", before)
        # Only Train's marker lies there. A name that others know could be taken by another user of the machine.
        storage = os.path.join(tempfile.gettempdir(), f"mtc-train-{uuid.uuid4().hex}")
        try:
            _interruptible(_trainer(config, plan, run, store_url, d_model, log, storage).fit, look)
            last = _wait_for_result(checkpoints)
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            if cause := permanent_cause(error):
                raise cause from None
            _remove(set(own_placement_groups()) - groups)
            last = checkpoints.latest()
            progress = last is not None and last.manifest.step > before
            failures = 1 if progress else failures + 1
            tried_by_train = isinstance(error, ray.train.TrainingFailedError)
            if failures > config.cluster.max_failures or (tried_by_train and not progress):
                logger.error("the trainers' last failure", exc_info=error)
                raise TrainingFailed(
                    f"cluster.max_failures={config.cluster.max_failures}: no new checkpoint in so many restarts; "
                    f"at last: {one_line(error)}"
                ) from None
            pause = min(2.0**failures, LONGEST_PAUSE)
            tell("restart", f"training is started again in {pause:.0f} s: {one_line(error)}")
            time.sleep(pause)
        finally:
            shutil.rmtree(storage, ignore_errors=True)
    trained = _result(last, run)
    check_ledger(trained.progress, len(work.training))
    return trained


def _trainer(
    config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, d_model: int, log: Any, storage: str
) -> Any:
    fewest = min(config.cluster.min_trainers or plan.num_trainers, plan.num_trainers)
    return TorchTrainer(
        train_worker,
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
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[TellFailures(log)],  # type: ignore[list-item]
            worker_runtime_env=plan.runtime_env,  # type: ignore[call-arg]  # of Train v2
        ),
    )


def _remove(groups: set[str]) -> None:
    """Give the CPUs and GPUs of placement groups back. Where the Train controller dies together with its helper that
    should do this, they would stay reserved until the job ends."""
    for name in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _no_dataset() -> None:
    """Stands for the Dataset, which StreamConfig makes, since it knows how many trainers there are."""


def _wait_for_result(checkpoints: Checkpoints) -> Checkpoint:
    """The checkpoint with the trainers' result; another node may have written it."""
    deadline = time.monotonic() + LISTING_SECONDS
    while (last := checkpoints.latest()) is None or not last.is_result:
        if time.monotonic() > deadline:
            raise NotVisibleError(
                f"{checkpoints.url}: the trainers ended, but the checkpoint with their result is not visible here "
                f"after {LISTING_SECONDS:.0f} s; submit the job again"
            )
        time.sleep(0.5)
    return last


def _result(checkpoint: Checkpoint, run: RunDirectory) -> Trained:
    """What training ended with, from the last checkpoint, whose weights and ledger are copied into the run."""
    result = json.loads(checkpoint.read("result.json"))
    found = result.get("members") or result["layers"]  # as an earlier version called them
    members = tuple(TrainResult(**({"member": f"layer{each['layer']}"} | each)) for each in found)
    places = run.members()
    for each in members:
        weights = checkpoint.read(weights_file("transcoder", each.member))
        places[each.member].write("transcoder.safetensors", weights)
    progress = read_progress(checkpoint)
    ledger = progress_to_parquet(progress.table)
    for own in places.values():
        own.write("ledger.parquet", ledger)
    return Trained(members, StreamTiming(**result["timing"]), progress)


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
        go_on()
        raise error
