"""The main job: configuration -> token store -> training -> held-out pass -> report -> finished run directory."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.activations import configure_data_context
from cluster.gpus import check_devices, on_one_gpu
from cluster.job_metrics import JobMetrics
from cluster.local_ray import check_installation, temporary_root
from cluster.outcome import Trained, TrainingStopped, TrainResult
from cluster.probing import check_optional
from cluster.progress import ProgressReader, balance, start_metrics_log
from cluster.reporting import analyse_and_write, publish, timed
from cluster.resources import WORKER_ENVIRONMENT, Plan, cluster_nodes, make_plan
from cluster.tokenise import build_token_store, check_data
from cluster.training import train
from mtc.config import ConfigError, RunConfig, to_yaml
from mtc.language_model import check_model, prepare_model
from mtc.results import RunFacts
from mtc.storage import Lease, RunDirectory, absolute
from mtc.telemetry import check_trackers, prints_left_out, say, set_run
from mtc.telemetry.tracking import tracking
from mtc.text import StoreInfo, TokenStore, heldout_units, work_units

logger = logging.getLogger(__name__)


class FinishedError(ConfigError):
    """The run is finished already: there is nothing left to do."""

    exit_code = 3
    event = "nothing_to_do"


LIMITS = ("data.max_skipped_share", "optimizer.max_skipped_steps")  # may be raised to continue a run


def check(config: RunConfig) -> None:
    """Everything that can be known to fail, before any cluster work, within seconds.

    Raises ConfigError (FinishedError for a finished run), ModelError or DataError.
    """
    try:
        RunDirectory(_output_root(config))
    except ImportError as error:
        raise ConfigError(f"output.root={config.output.root}: {error}; pip install -e '.[s3]' or '.[gcs]'") from None
    if config.output.run_id:
        _check_unfinished(RunDirectory(f"{_output_root(config)}/{config.output.run_id}"))
    check_model(config.model)
    check_data(config)
    check_optional(config)
    check_trackers(config)


@contextmanager
def connected(verbose: bool = False) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of the surrounding Ray job; without one, run a local Ray for this process.

    What Ray, its daemons and workers print is left to Ray's log files unless `verbose`. Raises ConfigError where a
    local Ray cannot run.
    """
    how: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    how |= {"configure_logging": False}  # its records go where all others go
    logging.getLogger("ray").setLevel(how["logging_level"])
    with prints_left_out(verbose):
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **how)
        else:
            check_installation()
            os.environ.update({name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ})
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            ray.init(address="local", dashboard_host="127.0.0.1", _temp_dir=f"{temporary_root()}/ray", **how)
        try:
            yield
        finally:
            ray.shutdown()


def run_pipeline(config: RunConfig) -> RunDirectory:
    """Run the whole job on the connected cluster; returns the finished run.

    An unfinished run of the same `output.run_id` continues from its last checkpoint.
    """
    configure_data_context()
    d_model = check_model(config.model).d_model
    plan = make_plan(config, cluster_nodes(), d_model)
    check_devices(config, plan)
    run = _run_directory(config)
    config = config.model_copy(update={"output": config.output.model_copy(update={"run_id": run.run_id})})
    set_run(run.run_id)
    log = start_metrics_log(run)
    with Lease(run) as lease:  # nobody writes into a run that another job writes
        _check_unfinished(run)
        config = _shared_places(config, run)
        _check_same_run(config, run)
        metrics = JobMetrics(config, run.run_id)
        with metrics.served():
            _run(config, plan, run, d_model, log, lease, metrics)
    return run


def _run(
    config: RunConfig, plan: Plan, run: RunDirectory, d_model: int, log: Any, lease: Lease, metrics: JobMetrics
) -> None:
    say("run", f"run {run.run_id} in {run.url}", url=run.url)
    say("plan", plan.describe(), device=plan.device, trainers=plan.num_trainers, model_actors=plan.num_model_actors)
    if config.model.notice:
        say("notice", config.model.notice)
    metrics.plan(plan.device, plan.num_trainers, plan.num_model_actors)
    metrics.stage("prepare")
    say("prepare", "preparing the language model (the first time, weights are converted or downloaded into the cache)")
    prepare_model(config.model)
    run.write("config.yaml", to_yaml(config))
    layers = config.for_layers()
    runs = [run.for_layer(alone.model.layer) for alone in layers]
    if len(layers) > 1:
        for alone, own in zip(layers, runs, strict=True):
            own.write("config.yaml", to_yaml(alone))
    seconds: dict[str, float] = {}

    metrics.stage("tokenise")
    with timed(seconds, "tokenise"):
        store_url = build_token_store(config, plan.label_selector)
    store = TokenStore.open(store_url)
    info = store.info
    counts = {"windows": info.windows, "tokens": info.tokens, "documents": info.documents}
    about = ", ".join(f"{sum(each.values()):,} {name}" for name, each in counts.items())
    say("token_store", f"token store {store_url}: {about}", url=store_url, **counts)
    work = work_units(store, config)  # a text that is too short is found here, not after the training
    heldout_units(store, config, config.analysis.num_tokens)

    metrics.stage("train")
    with timed(seconds, "train"), tracking(config, run) as trackers, on_one_gpu(config, plan) as together:
        histories = {alone.model.layer: own for alone, own in zip(layers, runs, strict=True)}
        with ProgressReader(log, histories, config.total_steps, [metrics, *trackers]) as progress:

            def go_on() -> None:
                lease.require()
                if progress.stopped:
                    raise TrainingStopped(progress.stopped)

            trained = train(config, together, run, store_url, d_model, log, go_on, work)
    first = trained.layers[0]
    done = f"trained {first.tokens:,} tokens in {first.steps:,} steps; " + _thresholds(trained)
    say("trained", done, tokens=first.tokens, steps=first.steps)
    say("ledger", _account(trained))
    say("balance", balance(trained.timing), **trained.timing.model_dump())

    facts = [
        _facts(config, plan, own, store_url, info, layer, trained, seconds, progress.events)
        for own, layer in zip(runs, trained.layers, strict=True)
    ]
    rows = [progress.rows(layer.layer) for layer in trained.layers]
    metrics.stage("analyse")
    analyses = analyse_and_write(config, plan, run, store_url, facts, rows, lease.require)
    lease.require()
    publish(run, latest=True)
    seconds = analyses[0].facts.seconds
    metrics.stage("finished")
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    say("finished", f"finished {run.url} in {took}", url=run.url, seconds=seconds)


def _account(trained: Trained) -> str:
    """What the ledger, which was checked, says of the training tokens."""
    progress = trained.progress
    line = f"ledger: {len(progress.finished())} work units, {progress.trained_tokens():,} tokens trained, each once"
    if dropped := progress.dropped_tokens():
        line += f"; {dropped:,} dropped as not finite"
    if skipped := max(layer.skipped_steps for layer in trained.layers):
        line += f"; {skipped:,} steps had no finite gradient and changed nothing"
    return line


def _thresholds(trained: Trained) -> str:
    if len(trained.layers) == 1:
        return f"threshold {trained.layers[0].threshold:.4f}"
    return "thresholds " + ", ".join(f"{layer.threshold:.4f} (layer {layer.layer})" for layer in trained.layers)


def _run_directory(config: RunConfig) -> RunDirectory:
    run_id = config.output.run_id
    if run_id is None:
        model = config.model.name.removeprefix("pip:").replace("random:", "random-").rstrip("/").split("/")[-1]
        run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{model}-{_layer_names(config)}"
    return RunDirectory(f"{_output_root(config)}/{run_id}")


def _check_unfinished(run: RunDirectory) -> None:
    if run.is_finished():
        raise FinishedError(f"output.run_id={run.run_id} is a finished run: {run.url}")


def _layer_names(config: RunConfig) -> str:
    layers = [str(sites.layer) for sites in config.model.sites]
    return (
        f"layer{layers[0]}" if len(layers) == 1 else f"layers{'-'.join(layers[:4])}" + "-and-more" * (len(layers) > 4)
    )


def _output_root(config: RunConfig) -> str:
    """`output.root`; a relative path counts from the home directory in a submitted job, whose own is a copy that Ray
    deletes."""
    root = config.output.root
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return absolute(os.path.join("~", root) if submitted and "://" not in root else root)


def _shared_places(config: RunConfig, run: RunDirectory) -> RunConfig:
    """On several nodes: checks that all reach the run directory, and puts the token store beside it.

    Raises ConfigError that names the nodes which do not.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return config
    if config.output.token_store is None and "://" not in config.output.root:
        places = config.output.model_copy(update={"token_store": f"{_output_root(config)}/tokens"})
        config = config.model_copy(update={"output": places})
    probe = f".reached-by-{uuid.uuid4().hex[:8]}"
    run.write(probe, probe)
    try:
        answers = {
            node["NodeManagerAddress"]: ray.remote(_reaches)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(run.url, probe)
            for node in others
        }
        missing = [address for address, answer in answers.items() if not ray.get(answer)]
    finally:
        run.remove(probe)
    if missing:
        raise ConfigError(
            f"output.root={config.output.root}: {len(missing)} of {len(others) + 1} nodes do not see what is written "
            f"there ({', '.join(missing[:5])}); on several nodes give a disk that all of them share, or s3:// or gs://"
        )
    return config


def _reaches(url: str, name: str) -> bool:
    return RunDirectory(url).exists(name)


def _check_same_run(config: RunConfig, run: RunDirectory) -> None:
    """Refuse to continue an unfinished run with settings that would mix two runs."""
    if not run.exists("config.yaml"):
        return
    before, now = (c.model_dump(mode="json", exclude={"output", "cluster"}) for c in (run.config(), config))
    changed = [f"{part}.{f}" for part in now for f in now[part] if now[part][f] != before[part].get(f)]
    changed = [field for field in changed if field not in LIMITS]
    if changed:
        raise ConfigError(
            f"output.run_id={run.run_id} is an unfinished run with other values of {', '.join(changed)}: "
            "give another output.run_id, or the same values to continue it"
        )


def _facts(
    config: RunConfig,
    plan: Plan,
    run: RunDirectory,
    store_url: str,
    info: StoreInfo,
    trained: TrainResult,
    whole: Trained,
    seconds: dict[str, float],
    events: list[dict[str, Any]],
) -> RunFacts:
    return RunFacts(
        run_id=run.run_id,
        steps=trained.steps,
        trained_tokens=trained.tokens,
        calibration_tokens=trained.calibration_tokens,
        token_store=store_url,
        data_name=config.data.name,
        windows=dict(info.windows),
        documents=dict(info.documents),
        language_model_dtype="",  # the analysis tells
        precision=trained.precision,
        compute=trained.compute,
        devices=(plan.device,),
        num_trainers=plan.num_trainers,
        num_model_actors=plan.num_model_actors,
        seconds=seconds,
        timing=whole.timing,
        dropped_tokens=whole.progress.dropped_tokens(),
        skipped_documents=info.skipped,
        skipped_examples=tuple(info.skipped_examples),
        events=tuple(events),
        other_layers=tuple(s.layer for s in config.model.sites if s.layer != trained.layer),
        data_fingerprint=info.fingerprint,
    )
