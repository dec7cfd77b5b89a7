"""Attribution graphs of held-out prompts, of a run of several layers: Ray tasks, each with the whole language model in
float32 and all transcoders."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from cluster.memory_analysis import MAX_FEATURES, PROMPT_TOKENS, graph_bytes, graph_processes
from cluster.resources import Plan
from cluster.room import ClusterBusy, reserved
from mtc.config import RunConfig
from mtc.devices import open_device
from mtc.errors import one_line
from mtc.language_model import check_model
from mtc.results import GraphScores, ScoredPrompt
from mtc.storage import RunDirectory
from mtc.telemetry import say
from mtc.text import TokenStore


def measure_graphs(
    config: RunConfig, plan: Plan, run: RunDirectory, store_url: str, windows: NDArray[np.int64]
) -> GraphScores | None:
    """Score the graphs of the first tokens of `analysis.graph_prompts` of these held-out windows; None if none are
    wanted, of a single transcoder, of a sweep, which has several of a layer, and if there is no room."""
    prompts = _prompts(TokenStore.open(store_url), windows, config.analysis.graph_prompts)
    if not prompts or len(config.members()) < 2 or config.sweep:
        return None
    info = check_model(config.model, config.data.context_length)
    count = min(len(prompts), graph_processes(config, plan, info))
    if not count:
        need = f"{graph_bytes(config, info) / 1e9:.1f} GB of main memory"
        say(
            "left_out", f"graphs are left out, all else is written: a process of them takes {need}, no node has as much"
        )
        return None
    each = {"CPU": plan.actor_cpus} | ({"GPU": plan.actor_gpus} if plan.actor_gpus else {})
    memory = graph_bytes(config, info) if all(node.memory for node in plan.nodes) and plan.device == "cpu" else None
    if memory:
        each["memory"] = memory
    try:
        with reserved(each, count, plan.label_selector, config.cluster.room_seconds) as place:
            options: dict[str, Any] = {"num_cpus": plan.actor_cpus, "num_gpus": plan.actor_gpus, "memory": memory}
            options |= {"runtime_env": plan.runtime_env, "scheduling_strategy": place}
            score = ray.remote(_score).options(**options)
            answers = [
                score.remote(config, run.url, prompts[n::count], plan.device, plan.actor_threads) for n in range(count)
            ]
            parts = [json.loads(answer) for answer in ray.get(answers)]
    except (ClusterBusy, RayError) as error:  # what is measured besides must not cost what is measured first
        say(
            "left_out",
            f"graphs are left out, all else is written: {one_line(error)}; jobs/analyze.py measures them later",
        )
        return None
    found = [ScoredPrompt.model_validate(parts[n % count][n // count]) for n in range(len(prompts))]
    return GraphScores(prefixes=config.transcoder.prefixes, max_features=MAX_FEATURES, prompts=tuple(found))


def _prompts(store: TokenStore, windows: NDArray[np.int64], wanted: int) -> list[list[int]]:
    """The first tokens of the first windows that have as many, each of another document where there are enough."""
    documents, found, spare = set[str](), list[list[int]](), list[list[int]]()
    for window, document in zip(windows, store.document_ids(windows), strict=True):
        if len(found) == wanted:
            break
        (ids,) = store.input_ids(np.asarray([window]))
        if len(ids) >= PROMPT_TOKENS:
            (spare if document in documents else found).append(ids[:PROMPT_TOKENS].tolist())
            documents.add(document)
    return [*found, *spare][:wanted]


def _score(config: RunConfig, run_url: str, prompts: list[list[int]], device: str, threads: int) -> str:
    from mtc.circuits import ReplacementModel
    from mtc.circuits.held_out import score_prompts

    torch.set_num_threads(threads)
    model = ReplacementModel.load(RunDirectory(run_url), open_device(device))
    found = score_prompts(model, prompts, config.transcoder.prefixes, MAX_FEATURES)
    return json.dumps([prompt.model_dump() for prompt in found])
