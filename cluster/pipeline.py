"""The main job: configuration -> token store -> training -> held-out pass -> report -> finished run directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.activations import configure_data_context
from cluster.checks import check_config
from cluster.gpus import check_devices, on_one_gpu
from cluster.job_metrics import JobMetrics
from cluster.local_ray import check_installation, session_directory, starting
from cluster.memory import MemoryPlan, check_memory
from cluster.outcome import Trained, TrainResult
from cluster.places import (
    check_same_run,
    check_unfinished,
    run_directory,
    share_places,
    warn_of_copies,
)
from cluster.progress import ProgressReader, balance, start_metrics_log
from cluster.reporting import analyse_and_write, timed
from cluster.resources import WORKER_ENVIRONMENT, Plan
from cluster.room import plan_in_free_room
from cluster.tokenise import build_token_store
from cluster.training import train
from mtc.config import RunConfig, to_yaml
from mtc.joining import joining
from mtc.language_model import check_model, prepare_model
from mtc.programs import runtime_env
from mtc.results import RunFacts
from mtc.storage import (
    Checkpoints,
    Lease,
    RunDirectory,
    note_token_store,
    noting_the_end,
    publish_whole,
    with_absolute_paths,
)
from mtc.telemetry import prints_left_out, say, set_run
from mtc.telemetry.tracking import tracking
from mtc.text import TokenStore, Work, heldout_units, work_units

logger = logging.getLogger(__name__)


def check(config: RunConfig) -> RunConfig:
    """Check everything that can be known to fail, before any cluster work, within seconds; returns the configuration
    with the model's layers in the place of `model.layers: all`. Raises what `check_config` does."""
    return check_config(config).config


@contextmanager
def connected(verbose: bool = False) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of the surrounding Ray job; without one, run a local Ray for this process.

    What Ray, its daemons and workers print is left to Ray's log files unless `verbose`. Raises ConfigError where a
    local Ray cannot run, LocalRayError where it did not start, and what `mtc.joining` raises for an address at which no
    cluster answers.
    """
    how: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    how |= {"configure_logging": False}  # its records go where all others go
    logging.getLogger("ray").setLevel(how["logging_level"])
    with prints_left_out(verbose):
        address = os.environ.get("RAY_ADDRESS")
        if address and address != "local":
            with joining(address, "RAY_ADDRESS"):
                ray.init(address="auto", runtime_env=runtime_env() or None, **how)
        else:
            check_installation()
            os.environ.update({name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ})
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            directory = session_directory()
            with starting():
                ray.init(address="local", dashboard_host="127.0.0.1", _temp_dir=directory, **how)
        try:
            yield
        finally:
            ray.shutdown()


def run_pipeline(config: RunConfig) -> RunDirectory:
    """Run the whole job on the connected cluster; returns the finished run.

    An unfinished run of the same `output.run_id` continues from its last checkpoint.
    """
    config = with_absolute_paths(config)
    configure_data_context()
    info = check_model(config.model, config.data.context_length)
    config, d_model = config.of_layers(info.num_layers), info.d_model
    plan = check_devices(config, plan_in_free_room(config, d_model))
    memory = check_memory(config, plan, info)
    run = run_directory(config)
    config = config.model_copy(update={"output": config.output.model_copy(update={"run_id": run.run_id})})
    set_run(run.run_id)
    warn_of_copies(config)
    log = start_metrics_log(run)
    try:
        with Lease(run) as lease:  # nobody writes into a run that another job writes
            check_unfinished(run)
            with noting_the_end(run, lease):
                config = share_places(config, run)
                check_same_run(config, run)
                metrics = JobMetrics(config, run.run_id)
                with metrics.served():
                    _Job(config, plan, run, d_model, log, lease, metrics, memory).run_stages()
    finally:
        ray.kill(log)  # else the run could not be continued as long as anything, such as a traceback, holds the handle
    return run


@dataclass(frozen=True)
class _Job:
    """What all stages of one job know; each hands the next what that needs."""

    config: RunConfig
    plan: Plan
    run: RunDirectory
    d_model: int
    """Width of the language model's residual stream."""
    log: Any
    """Handle of the MetricsLog actor."""
    lease: Lease
    metrics: JobMetrics
    memory: MemoryPlan
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the stages that are over, by name."""

    def run_stages(self) -> None:
        run, plan = self.run, self.plan
        say("run", f"run {run.run_id} in {run.url}", url=run.url)
        said = f"{plan.describe()}\n{self.memory.describe()}"
        say("plan", said, device=plan.device, trainers=plan.num_trainers, model_actors=plan.num_model_actors)
        self.metrics.plan(plan.device, plan.num_trainers, plan.num_model_actors)
        self._prepare()
        store, work = self._tokenise()
        trained, progress = self._train(store, work)
        self._analyse(store, trained, progress)

    def _prepare(self) -> None:
        """Make the language model ready, and write the configuration down."""
        self.metrics.stage("prepare")
        config = self.config
        if config.model.notice:
            say("notice", config.model.notice)
        say(
            "prepare",
            "preparing the language model (the first time, weights are converted or downloaded into the cache)",
        )
        prepare_model(config.model)
        self.run.write("config.yaml", to_yaml(config))
        members, places = config.members(), self.run.members()
        for member in members if len(members) > 1 else ():
            places[member.name].write("config.yaml", to_yaml(member.config))

    def _tokenise(self) -> tuple[TokenStore, Work]:
        """Have the text as windows of token ids. Raises DataError if there is too little of it."""
        self.metrics.stage("tokenise")
        with timed(self.seconds, "tokenise"):
            store = TokenStore.open(build_token_store(self.config, self.plan, self.metrics.tokenised))
        note_token_store(self.run, store.url)
        info = store.info
        self.metrics.tokenised(info.tokens)
        counts = {"windows": info.windows, "tokens": info.tokens, "documents": info.documents}
        about = ", ".join(f"{sum(each.values()):,} {name}" for name, each in counts.items())
        extent = "all of the text" if info.exhausted else "as much of the text as the run needs"
        say("token_store", f"token store {store.url}: {about}, {extent}", url=store.url, **counts)
        work = work_units(store, self.config)  # a text that is too short is found here, not after the training
        heldout_units(store, self.config, self.config.analysis.num_tokens)
        return store, work

    def _train(self, store: TokenStore, work: Work) -> tuple[Trained, ProgressReader]:
        """Train every transcoder; returns what was read of the training's progress too."""
        config, run = self.config, self.run
        self.metrics.stage("train")
        with (
            timed(self.seconds, "train"),
            tracking(config, run) as trackers,
            on_one_gpu(config, self.plan) as plan,
            ProgressReader(self.log, run.members(), config.total_steps, [self.metrics, *trackers]) as progress,
        ):
            trained = train(config, plan, run, store.url, self.d_model, self.log, self.lease.require, work)
        first = trained.members[0]
        captured, times = trained.progress.captured_tokens(), config.data.replays
        tokens = f"{first.tokens:,} tokens" + (f" ({captured:,} captured, each {times} times)" if times > 1 else "")
        done = f"trained {tokens} in {first.steps:,} steps; " + _thresholds(trained)
        say("trained", done, tokens=first.tokens, captured_tokens=captured, steps=first.steps)
        say("ledger", _account(trained, times))
        apart = plan.device == "cuda" and not plan.shares_gpu  # on CPUs the model actors would have less
        say("balance", balance(trained.timing, times if apart else None), **trained.timing.model_dump())
        return trained, progress

    def _analyse(self, store: TokenStore, trained: Trained, progress: ProgressReader) -> None:
        """Run the held-out pass, write every transcoder's report, and the manifest with which the run is finished."""
        self.metrics.stage("analyse")
        facts = [self._facts(store, trained, each, progress.events) for each in trained.members]
        rows = (progress.rows(each.member) for each in trained.members)
        written = analyse_and_write(
            self.config, self.plan, self.run, store.url, facts, rows, self.lease.require, self.memory.at_once,
            self.metrics.progress,
        )  # fmt: skip
        self.lease.require()
        publish_whole(self.run, latest=True)
        if not self.config.output.keep_checkpoints_after_finish:
            self._remove_checkpoints()
        seconds = self.seconds | written.seconds
        self.metrics.stage("finished")
        took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        say("finished", f"finished {self.run.url} in {took}", url=self.run.url, seconds=seconds)

    def _remove_checkpoints(self) -> None:
        try:
            Checkpoints(self.run.url).remove()
        except Exception as error:  # of the storage; the run is finished all the same
            logger.warning("checkpoints stay, until jobs/runs.py gc removes them: %s", error)

    def _facts(self, store: TokenStore, trained: Trained, own: TrainResult, events: list[dict[str, Any]]) -> RunFacts:
        """RunFacts of one transcoder's run, as far as they are known before its analysis."""
        sites, info = self.config.model.sites, store.info
        return RunFacts(
            run_id=f"{self.run.run_id}/{own.member}" if len(trained.members) > 1 else self.run.run_id,
            steps=own.steps,
            trained_tokens=own.tokens,
            captured_tokens=trained.progress.captured_tokens(),
            calibration_tokens=own.calibration_tokens,
            precision=own.precision,
            compute=own.compute,
            other_layers=tuple(other.layer for other in sites if other.layer != own.layer),
            other_members=tuple(other.member for other in trained.members if other.member != own.member),
            timing=trained.timing,
            dropped_tokens=trained.progress.dropped_tokens(),
            language_model_dtype="",  # the analysis tells
            devices=(self.plan.device,),
            num_trainers=self.plan.num_trainers,
            num_model_actors=self.plan.num_model_actors,
            data_name=self.config.data.name,
            token_store=store.url,
            windows=dict(info.windows),
            documents=dict(info.documents),
            skipped_documents=info.skipped,
            skipped_examples=tuple(info.skipped_examples),
            unread_files=info.unread,
            unread_examples=tuple(info.unread_examples),
            data_fingerprint=info.fingerprint,
            seconds=self.seconds,
            events=tuple(events),
        )


def _account(trained: Trained, replays: int) -> str:
    """A line of what the ledger, which was checked, says of the training tokens."""
    progress = trained.progress
    each = "each once" if replays == 1 else f"each of {progress.captured_tokens():,} {replays} times"
    line = f"ledger: {len(progress.finished())} work units, {progress.trained_tokens():,} tokens trained, {each}"
    if dropped := progress.dropped_tokens():
        line += f"; {dropped:,} dropped as not finite"
    if skipped := max(each.skipped_steps for each in trained.members):
        line += f"; {skipped:,} steps had no finite gradient and changed nothing"
    return line


def _thresholds(trained: Trained) -> str:
    if len(trained.members) == 1:
        return f"threshold {trained.members[0].threshold:.4f}"
    return "thresholds " + ", ".join(f"{each.threshold:.4f} ({each.member})" for each in trained.members)
