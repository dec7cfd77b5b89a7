"""From finished weights to a published analysis: after training, and again whenever somebody asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.activations import configure_data_context
from cluster.gpus import check_devices
from cluster.held_out import HeldOutResults, analyse_heldout
from cluster.memory import transcoders_at_once
from cluster.probing import check_optional
from cluster.resources import Plan
from cluster.room import plan_in_free_room
from cluster.spool import Spool, Staged
from cluster.tokenise import build_token_store
from mtc.analysis import features_to_parquet
from mtc.analysis.analyse import analyse
from mtc.analysis.contexts import contexts_to_parquet
from mtc.config import Member, RunConfig, changed_config
from mtc.labels import keep_labels
from mtc.language_model import check_model, load_tokenizer
from mtc.report import write_report
from mtc.report.layers import write_layers_report
from mtc.report.sweep import JSON as SWEEP_JSON
from mtc.report.sweep import write_sweep_report
from mtc.results import RUN_FILES, Analysis, Headline, RunFacts
from mtc.storage import Lease, RunDirectory, RunError, note_token_store, open_run, publish_whole
from mtc.telemetry import describe_machine, git_revision, package_versions, say, set_run
from mtc.text import DataError, StoreInfo, TokenStore, still_serves
from mtc.transcoder import load_transcoder

NEW_FILES = ("features.parquet", "examples.parquet", "contexts.parquet", "analysis.json", "manifest.json")
"""Files that are there when the analysis is."""


class Written(NamedTuple):
    """An analysis that was written."""

    headlines: list[Headline]
    """Of each of the run's transcoders."""
    seconds: dict[str, float]
    """Wall time of its stages: `analyse` until the first transcoder's findings are there, `report` until all is
    written."""


def analyse_and_write(
    config: RunConfig,
    plan: Plan,
    run: RunDirectory,
    store_url: str,
    facts: Sequence[RunFacts],
    histories: Iterable[list[dict[str, Any]]],
    still_ours: Callable[[], None],
    at_once: int | None = None,
    got_on: Callable[[], None] = lambda: None,
) -> Written:
    """Run the held-out pass and write every transcoder's examples, features, analysis and report; nothing is published.

    `facts` and `histories` are of each of the run's transcoders; facts of the analysis itself are filled in here.
    `still_ours` raises if another job has taken the run meanwhile; it is asked before every write. `at_once` is that of
    `analyse_heldout`. `got_on` is called for each part of the results that arrives. Of many transcoders no more than
    one's findings are in memory at a time.
    """
    seconds: dict[str, float] = {}
    members, places = config.members(), run.members()
    with Spool(got_on) as spool:
        staged = Staged(spool)
        reports = _Reports(staged, len(members) > 1)

        def stage(found: HeldOutResults, member: Member, facts: RunFacts, history: list[dict[str, Any]]) -> Headline:
            """Compute the files of one transcoder; what is left in memory of it is small."""
            own = places[member.name]
            facts = _facts_now(plan, store_url, found, facts, seconds)
            analysis, features = analyse(member.config, load_transcoder(own), found.found, history, facts)
            analysis = keep_labels(own, analysis)
            content = {
                "examples.parquet": found.found.examples.to_parquet(),
                "contexts.parquet": contexts_to_parquet(found.found.contexts),
                "features.parquet": features_to_parquet(features),
                "analysis.json": analysis.model_dump_json(indent=1).encode(),
            }
            staged.add(own, content)
            reports.add(own, analysis, features, history)
            _say_heldout(analysis, member, f"{member.name}: " if len(members) > 1 else "")
            return analysis.headline()

        results = analyse_heldout(config, plan, run, store_url, spool, at_once)
        with timed(seconds, "analyse"):
            first = [next(results)]
        replaced, graphs = first[0].replaced, first[0].graphs
        with timed(seconds, "report"):
            headlines = [
                stage(first.pop() if first else next(results), *about)  # which nobody else holds
                for about in zip(members, facts, histories, strict=True)
            ]
            reports.finish()
            whole: dict[str, bytes] = {}
            if config.sweep:
                whole = write_sweep_report(dict(zip(places, headlines, strict=True)), config.sweep)
            elif len(members) > 1:
                whole = write_layers_report(headlines, replaced, graphs)
            staged.add(run, {f"report/{name}": data for name, data in whole.items()})
            # All is computed before the first file is written: an older analysis stays whole for as long as can be.
            for place, name, data in staged:
                still_ours()
                place.write(name, data)
    if whole:
        _say_compared(run, whole, len(members))
    return Written(headlines, seconds)


def _facts_now(
    plan: Plan, store_url: str, found: HeldOutResults, facts: RunFacts, seconds: dict[str, float]
) -> RunFacts:
    """Facts of a run with those of its analysis."""
    about = {
        "language_model_dtype": found.dtype,
        "language_model_compute": found.compute,
        "token_store": store_url,
        "devices": (plan.device,),
        "seconds": facts.seconds | seconds,
        "versions": package_versions(),
        "git_revision": git_revision(),
        "hardware": tuple(dict.fromkeys([describe_machine(), *found.machines])),
    }
    return facts.model_copy(update=about)


def _say_compared(run: RunDirectory, files: Mapping[str, bytes], transcoders: int) -> None:
    """Tell where several transcoders are compared, and of a sweep which the report takes, by layer."""
    page, taken = next(name for name in files if name.endswith(".html")), dict[str, str]()
    text = f"{run.location(f'report/{page}')} compares the {transcoders} transcoders"
    if SWEEP_JSON in files:
        taken = json.loads(files[SWEEP_JSON])["taken"]
        text += f"; to take: {', '.join(taken.values())}"
    say("compared", text, transcoders=transcoders, taken=taken)


def _say_heldout(analysis: Analysis, member: Member, where: str) -> None:
    """Tell the headline figures, and beside them those of all tokens where they differ."""
    found, of_all = analysis.evaluation, analysis.evaluation.all_tokens
    massive = found.massive.tokens
    fvu, all_fvu = (" ".join(f"{value:.3f}" for value in part.fvu) for part in (found, of_all))
    text = f"{where}held-out fvu {fvu}, l0 {found.l0[-1]:.2f} (k {analysis.summary.k})"
    if massive:
        text += f", without {massive:,} massive tokens; of all tokens fvu {all_fvu}, l0 {of_all.l0[-1]:.2f}"
    if found.line:
        text += f"; affine map fvu {found.line.fvu:.3f}"
    figures = {"member": member.name, "layer": member.config.model.layer, "fvu": found.fvu, "l0": found.l0[-1]}
    figures |= {"massive_tokens": massive, "all_tokens_fvu": of_all.fvu, "all_tokens_l0": of_all.l0[-1]}
    say("heldout", text, **figures)


def analyse_run(url: str, overrides: dict[str, Any]) -> RunDirectory:
    """Analyse a finished run again, without training; returns the run.

    `overrides` are nested values of `analysis` and `cluster`; they are noted in the analysis, while config.yaml
    stays what the run was trained with (how much held-out text is wanted decides what else of the text is read).
    Readers see the old analysis until the new one is written, which takes seconds; a reader that checks digests in
    between is told that the run is damaged.

    Raises RunError for a run that is not there or not finished, ConfigError for other overrides.
    """
    run = open_run(url, verify=False)
    if "/" in run.run_id:
        whole = run.url.rstrip("/").rsplit("/", 1)[0]
        raise RunError(f"{run.url} is one transcoder of a run of several, which are analysed together: name {whole}")
    config = changed_config(run.config(), overrides)
    check_optional(config)
    info = check_model(config.model, config.data.context_length)
    configure_data_context()
    plan = check_devices(config, plan_in_free_room(config, info.d_model))
    at_once = transcoders_at_once(config, plan, info)
    with Lease(run) as lease:
        members = list(run.members().values())
        for own in members:
            own.verify(("transcoder.safetensors",))
        set_run(run.run_id)
        say("run", f"run {run.run_id} in {run.url}", url=run.url)
        store_url = _token_store(config, members[0], plan)
        note_token_store(run, store_url)
        store = TokenStore.open(store_url).info
        facts = [_earlier_facts(config, own, store, plan) for own in members]
        histories = (own.read_lines("metrics.jsonl") for own in members)
        written = analyse_and_write(config, plan, run, store_url, facts, histories, lease.require, at_once)
        lease.require()
        publish_whole(run, latest=False)
    seconds = sum(written.seconds.values())
    say("analysed", f"analysed {run.url} in {seconds:.0f} s", url=run.url, seconds=seconds)
    return run


def _token_store(config: RunConfig, run: RunDirectory, plan: Plan) -> str:
    """The text as windows of token ids. If it is gone, what the run was trained on does as well, if that is still
    there and enough."""
    try:
        return build_token_store(config, plan)
    except DataError as error:
        earlier = json.loads(run.read("analysis.json"))["facts"] if run.exists("analysis.json") else {}
        url = earlier.get("token_store")
        if not url or not still_serves(url, config, load_tokenizer(config.model)):
            raise
        say("token_store", f"{error}; the tokenised text of the run is still there: {url}", url=url)
        return str(url)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """A context that notes the wall time of what runs inside, in seconds."""
    start = perf_counter()
    yield
    seconds[stage] = perf_counter() - start


class _Reports:
    """Reports of several transcoders, which Ray tasks on this node render while the next one is analysed: plots take
    longer than the analysis. The only one is rendered here, which needs no process to start.
    """

    def __init__(self, staged: Staged, several: bool):
        self._staged, self._several = staged, several
        self._at_once = len(os.sched_getaffinity(0))
        self._rendered: list[tuple[RunDirectory, Any]] = []

    def add(self, run: RunDirectory, analysis: Analysis, features: pa.Table, history: list[dict[str, Any]]) -> None:
        """Begin the report of a run; waits while as many are in work as there are CPUs."""
        if not self._several:
            self._stage(run, write_report(analysis, features, history))
            return
        while len(self._rendered) >= self._at_once:
            self._stage_first()
        # No CPU is asked for: one that others hold would be waited for.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        task = ray.remote(write_report).options(num_cpus=0, scheduling_strategy=here)
        self._rendered.append((run, task.remote(analysis, features, history)))

    def finish(self) -> None:
        """Wait for all that are in work."""
        while self._rendered:
            self._stage_first()

    def _stage_first(self) -> None:
        run, answer = self._rendered.pop(0)
        self._stage(run, ray.get(answer))

    def _stage(self, run: RunDirectory, report: Mapping[str, bytes]) -> None:
        self._staged.add(run, {f"report/{name}": data for name, data in report.items()})


def _earlier_facts(config: RunConfig, run: RunDirectory, store: StoreInfo, plan: Plan) -> RunFacts:
    """What an earlier analysis knew of the training; of an imported run, that nothing is known."""
    names = tuple(name for name in RUN_FILES | {"import.json": ""} if name in NEW_FILES or run.exists(name))
    about: dict[str, Any] = {
        "run_id": run.run_id,  # the manifest's, whoever wrote the earlier analysis
        "files": names,
        "data_fingerprint": store.fingerprint,
        "windows": dict(store.windows),
        "documents": dict(store.documents),
    }
    if run.exists("analysis.json"):
        earlier = RunFacts.model_validate(json.loads(run.read("analysis.json"))["facts"])
        return earlier.model_copy(update=about)
    return RunFacts(
        steps=0,
        trained_tokens=0,
        data_name=config.data.name,
        language_model_dtype="",
        devices=(plan.device,),
        num_trainers=0,
        num_model_actors=plan.num_model_actors,
        **about,
    )
