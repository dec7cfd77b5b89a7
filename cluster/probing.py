"""What the analysis measures only if it is asked for: sparse probes and first-letter spelling, a Ray task
for each transcoder."""

from __future__ import annotations

from typing import Any

import ray
import torch

from cluster.resources import Plan
from cluster.room import ClusterBusy, reserved
from mtc import language_model
from mtc.config import RunConfig
from mtc.devices import open_device
from mtc.language_model import load_tokenizer
from mtc.probing import (
    available_tasks,
    load_task,
    measure_spelling,
    probe,
    task_named,
    trained_documents,
)
from mtc.results import ProbeTask, Probing, Spelling
from mtc.storage import RunDirectory
from mtc.telemetry import say
from mtc.text import TokenStore
from mtc.transcoder import load_transcoder


def check_optional(config: RunConfig) -> None:
    """Raises DataError, in seconds, if what `analysis` asks for besides cannot be measured here."""
    for task in _tasks(config):
        load_task(task)


def measure_optional(config: RunConfig, plan: Plan, run_urls: list[str], store_url: str) -> list[dict[str, Any]]:
    """Measure for each transcoder what was asked for besides, as fields of Findings; one Ray task each, where model
    actors run."""
    layers = [sites.layer for sites in config.model.sites]
    site_of = [layers.index(member.config.model.layer) for member in config.members()]
    tasks = [
        (at, url, field, task)
        for at, url in enumerate(run_urls)
        for field, wanted, task in (
            ("probing", config.analysis.probe_tasks, _probe), ("spelling", config.analysis.spelling, _spell),
        )
        if wanted
    ]  # fmt: skip
    found: list[dict[str, Any]] = [{} for _ in run_urls]
    if not tasks:
        return found
    each = {"CPU": plan.actor_cpus} | ({"GPU": plan.actor_gpus} if plan.actor_gpus else {})
    room = (each, min(len(tasks), plan.num_model_actors), plan.label_selector, config.cluster.room_seconds)
    try:
        with reserved(*room) as place:
            options: dict[str, Any] = {"num_cpus": plan.actor_cpus, "num_gpus": plan.actor_gpus}
            options |= {"runtime_env": plan.runtime_env, "scheduling_strategy": place}
            answers = [
                ray.remote(task)
                .options(**options)
                .remote(config, url, site_of[at], store_url, plan.device, plan.actor_threads)
                for at, url, _, task in tasks
            ]
            for (at, _, field, _), answer in zip(tasks, answers, strict=True):
                kind = Probing if field == "probing" else Spelling
                found[at][field] = kind.model_validate_json(ray.get(answer))
    except ClusterBusy as error:
        say("left_out", f"probes are left out, all else is written: {error}; jobs/analyze.py measures them later")
    return found


def _tasks(config: RunConfig) -> list[ProbeTask]:
    names = config.analysis.probe_tasks
    return list(available_tasks()) if names == ("all",) else [task_named(name) for name in names]


def _probe(config: RunConfig, run_url: str, at: int, store_url: str, device: str, threads: int) -> str:
    torch.set_num_threads(threads)
    on = open_device(device)
    imported = RunDirectory(run_url).exists("import.json")  # nobody knows what it was trained on
    tasks = _tasks(config)
    return probe(
        language_model.LanguageModel(config.model, on),
        load_transcoder(RunDirectory(run_url), on),
        tasks,
        load_tokenizer(config.model),
        trained=() if imported else trained_documents(TokenStore.open(store_url), tasks),
        at=at,
        context_length=config.data.context_length,
        unit_tokens=config.data.unit_tokens,
    ).model_dump_json()


def _spell(config: RunConfig, run_url: str, at: int, store_url: str, device: str, threads: int) -> str:
    torch.set_num_threads(threads)
    on = open_device(device)
    transcoder = load_transcoder(RunDirectory(run_url), on)
    return measure_spelling(
        config.model, transcoder, device=on, at=at, unit_tokens=config.data.unit_tokens
    ).model_dump_json()
