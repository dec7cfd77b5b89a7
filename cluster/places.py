"""Where a run goes: its directory, whether it may be written, and that every node reaches it. Without torch."""

from __future__ import annotations

import logging
import posixpath
import uuid
from datetime import UTC, datetime

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mtc.config import ConfigError, RunConfig
from mtc.storage import JOB_COPY, RunDirectory, output_path, with_absolute_paths

logger = logging.getLogger(__name__)
REACH_SECONDS = 60.0
"""Longest wait for a node to look for a file; a network file system may hang."""
LIMITS = ("data.max_skipped_share", "optimizer.max_skipped_steps")  # may be raised to continue a run
MOST_SHOWN = 40
"""Characters of a value in a message."""


class FinishedError(ConfigError):
    """The run is finished already: there is nothing left to do."""

    exit_code = 3
    event = "nothing_to_do"


def output_root(config: RunConfig) -> str:
    """`output.root` as an absolute path or a URL."""
    return output_path(config.output.root)


def run_directory(config: RunConfig) -> RunDirectory:
    """The directory of `output.run_id`, or of a new name that says when, which model and which layers."""
    run_id = config.output.run_id
    if run_id is None:
        model = config.model.name.removeprefix("pip:").replace("random:", "random-").rstrip("/").split("/")[-1]
        run_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{model}-{_layer_names(config)}"
    return RunDirectory(posixpath.join(output_root(config), run_id))


def warn_of_copies(config: RunConfig) -> None:
    """Say so if the model or the text lies where Ray removes it after the job: the run names it for later jobs."""
    for field, name in (("model.name", config.model.name), ("data.name", config.data.name)):
        if JOB_COPY in name:
            logger.warning(
                "%s=%s lies in the job's copy of its working directory, which Ray deletes: nobody can %s from this run "
                "afterwards. Give an absolute path that every node has",
                field,
                name,
                "serve or analyse" if field == "model.name" else "read more text",
            )


def check_unfinished(run: RunDirectory) -> None:
    """Raises FinishedError for a finished run."""
    if run.is_finished():
        raise FinishedError(f"output.run_id={run.run_id} is a finished run: {run.url}")


def check_same_run(config: RunConfig, run: RunDirectory) -> None:
    """Refuse to continue an unfinished run with settings that would mix two runs."""
    if not run.exists("config.yaml"):
        return
    stored, config = run.config(), with_absolute_paths(config)
    if output_root(stored) != stored.output.root:  # by a version that stored relative paths, of which this is one
        stored = with_absolute_paths(stored)
    before, now = (c.model_dump(mode="json", exclude={"output", "cluster"}) for c in (stored, config))
    changed = ["sweep"] if now.pop("sweep") != before.pop("sweep") else []
    for part, asked in now.items():
        there = before[part]
        changed += [
            f"{part}.{name} ({_short(there.get(name))} there, {_short(value)} asked)"
            for name, value in asked.items()
            if value != there.get(name) and f"{part}.{name}" not in LIMITS
        ]
    if changed:
        raise ConfigError(
            f"output.run_id={run.run_id} is an unfinished run with other values of {', '.join(changed)}: "
            "give another output.run_id, or the same values to continue it"
        )


def _short(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def share_places(config: RunConfig, run: RunDirectory) -> RunConfig:
    """Check that all of several nodes reach the run directory, and put the token store beside it.

    Raises ConfigError that names the nodes which do not.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return config
    if config.output.token_store is None and "://" not in config.output.root:
        places = config.output.model_copy(update={"token_store": posixpath.join(output_root(config), "tokens")})
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
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=REACH_SECONDS)
        missing = [address for address, answer in answers.items() if not _answered(answer)]
    finally:
        run.remove(probe)
    if missing:
        raise ConfigError(
            f"output.root={config.output.root}: {len(missing)} of {len(others) + 1} nodes do not see what is written "
            f"there ({', '.join(missing[:5])}); on several nodes give a disk that all of them share, or s3:// or gs://"
        )
    return config


def _layer_names(config: RunConfig) -> str:
    layers = [str(sites.layer) for sites in config.model.sites]
    sweep = f"-sweep{len(config.sweep)}" if config.sweep else ""
    if len(layers) == 1:
        return f"layer{layers[0]}{sweep}"
    first, last = config.model.sites[0].layer, config.model.sites[-1].layer
    if len(layers) > 4 and layers == [str(layer) for layer in range(first, last + 1)]:
        return f"layers{first}-to-{last}{sweep}"
    return f"layers{'-'.join(layers[:4])}" + "-and-more" * (len(layers) > 4) + sweep


def _answered(answer: ray.ObjectRef) -> bool:
    return bool(ray.wait([answer], timeout=0)[0] and ray.get(answer))


def _reaches(url: str, name: str) -> bool:
    return RunDirectory(url).exists(name)
