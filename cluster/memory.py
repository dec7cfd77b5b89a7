"""The plan in bytes: what each process takes of its node's and its GPU's memory, held against what there is before any
work is done. Without torch and Ray, so that a plan can be checked where there is no cluster.

Counted is the fullest node. What is not known, of a node or of a GPU, refuses nothing.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cluster.memory_analysis import (
    analysis_bytes,
    analysis_driver,
    feature_actor,
    most_at_once,
    whole_actor,
)
from cluster.memory_terms import DRIVER, MODEL, RAY, Process, Term, gb
from cluster.memory_training import model_actor, stream_bytes, trainer, unit_bytes
from cluster.placement import split_of
from cluster.resources import Plan, make_plan
from mtc.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from mtc.language_model.architectures import ModelInfo

NAMED, OFFERED = 4, 3
"""Most terms that a refusal names, and fields that it offers to change."""


class Place(NamedTuple):
    """Processes of one kind on the fullest node."""

    process: Process
    """What each takes."""
    on_node: int
    """How many there are on the node."""
    on_gpu: int
    """How many there are on one GPU; 0 on CPUs."""


class Counted(NamedTuple):
    """A term of one kind of processes."""

    owner: str
    """Name of the process."""
    term: Term
    """Of one of them."""
    number: int
    """How many there are."""

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.number * self.term.bytes


class Stage(NamedTuple):
    """What a job has in memory at the same time."""

    name: str
    """`training` or `analysis`."""
    places: tuple[Place, ...]
    """All processes of the fullest node, by kind."""
    shares_gpu: bool
    """Whether they are on one GPU."""

    def main(self) -> list[Counted]:
        """Terms of the node's main memory."""
        return [Counted(p.process.name, term, p.on_node) for p in self.places for term in p.process.main]

    def gpus(self) -> list[list[Counted]]:
        """Terms of the memory of each GPU that differs: of one that is shared, or of one for each kind of process."""
        kinds = [[Counted(p.process.name, term, p.on_gpu) for term in p.process.gpu] for p in self.places if p.on_gpu]
        return [[each for kind in kinds for each in kind]] if self.shares_gpu else kinds


class MemoryPlan(NamedTuple):
    """What a run takes, and what it may take."""

    stages: tuple[Stage, ...]
    """Training and analysis, which follow each other."""
    at_once: int
    """Transcoders that one pass over the held-out text is for."""
    main: float
    """Bytes of main memory for processes on the largest node; 0 if one's is not known."""
    gpu: float
    """Bytes of the largest GPU; 0 if one's is not known."""
    unit: int
    """Bytes of a work unit in the object store."""
    store: float
    """Bytes of the largest node's object store; 0 if one's is not known."""

    def describe(self) -> str:
        """A table for people."""
        rows = [("", "", "processes", "main memory each", "GPU memory each", "most of it")]
        for stage in self.stages:
            for number, (process, on_node, on_gpu) in enumerate(stage.places):
                terms = sorted(process.gpu or process.main, key=lambda term: -term.bytes)
                most = ", ".join(f"{term.what} {gb(term.bytes)}" for term in terms[:2])
                each = gb(process.gpu_bytes) if on_gpu else "-"
                name = stage.name if not number else ""
                rows.append(
                    (name, f"{process.name}{'s' * (on_node > 1)}", f"{on_node}", gb(process.main_bytes), each, most)
                )
            on_gpus = max((_sum(terms) for terms in stage.gpus()), default=0)
            rows.append(
                ("", "together", "", _of(_sum(stage.main()), self.main), _of(on_gpus, self.gpu) if on_gpus else "-", "")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        store = f" of {gb(self.store)}" if self.store else ""
        head = f"memory of the fullest node, estimated; its object store{store} holds work units of {gb(self.unit)}"
        return "\n".join([head, *(f"  {line}" for line in lines)])


def check_memory(config: RunConfig, plan: Plan, info: ModelInfo, disk: float | None = None) -> MemoryPlan:
    """What a run of this plan takes.

    `disk` is what is free in the driver's temporary directory, by default in this machine's; math.inf asks for nothing
    of it. Raises ConfigError with the largest terms, the fields to change and what would fit, if training or analysis
    do not fit into the largest node or GPU, or the analysis not onto that disk.
    """
    found = memory_plan(config, plan, info)
    if _short(found.stages, found.main, found.gpu):
        _refuse(found.stages, found.main, found.gpu, _more_trainers(config, plan, info))
    if (fewest := config.cluster.min_trainers or plan.num_trainers) < plan.num_trainers:
        left = memory_plan(config, make_plan(config, plan.nodes, info.d_model, num_trainers=fewest), info)
        try:
            _refuse(left.stages, left.main, left.gpu)
        except ConfigError as error:
            raise ConfigError(f"where cluster.min_trainers={fewest} go on alone, {error}") from None
    _check_disk(config, info, disk)
    return found


def memory_plan(config: RunConfig, plan: Plan, info: ModelInfo) -> MemoryPlan:
    """What a run of this plan takes, whether or not that fits."""
    main, gpu = _rooms(config, plan, info)
    at_once = _at_once(config, plan, info, main, gpu)
    stages = _training(config, plan, info), _analysis(config, plan, info, at_once)
    store = _largest(node.object_store for node in plan.nodes)
    return MemoryPlan(stages, at_once, main, gpu, unit_bytes(config, info), store)


def transcoders_at_once(config: RunConfig, plan: Plan, info: ModelInfo) -> int:
    """For how many of a trained run's transcoders one pass over the held-out text can be. Raises ConfigError as
    `check_memory` does for the analysis."""
    main, gpu = _rooms(config, plan, info)
    at_once = _at_once(config, plan, info, main, gpu)
    _refuse([_analysis(config, plan, info, at_once)], main, gpu)
    _check_disk(config, info, None)
    return at_once


def _rooms(config: RunConfig, plan: Plan, info: ModelInfo) -> tuple[float, float]:
    """Main memory of the largest node and memory of the largest GPU that is used; 0 where one's is not known.

    Of a node's main memory that is what Ray counts for processes and, of what it may take for its object store, what
    the run's activations can't fill: the store takes memory as it is filled.
    """
    filled = stream_bytes(config, info)
    sizes = [node.memory and node.memory + max(node.object_store - filled, 0.0) for node in plan.nodes]
    gpus = [node.gpu_memory for node in plan.nodes if node.gpus and plan.device == "cuda"]
    return _largest(sizes), _largest(gpus)


def _training(config: RunConfig, plan: Plan, info: ModelInfo) -> Stage:
    on_gpu = plan.device == "cuda"
    trainers = 1 if plan.spread else plan.num_trainers
    actors = _actors_on_a_node(plan)
    shared = plan.shares_gpu
    step = trainer(config, info, plan.num_trainers, on_gpu, plan.trainer_threads)
    capture = model_actor(config, info, on_gpu).times(actors, "cluster.num_model_actors", shared)
    places = [
        Place(step, 1, on_gpu and (trainers if shared else 1)),
        Place(capture, actors, on_gpu and (actors if shared else 1)),
    ]
    if trainers > 1 and plan.transcoders:  # each writes its own ones' checkpoints
        places[0] = Place(step, trainers, on_gpu and (trainers if shared else 1))
    elif trainers > 1:  # only rank 0 writes checkpoints
        others = step._replace(main=tuple(term for term in step.main if "checkpoint" not in term.what))
        places[0] = Place(step, 1, on_gpu)
        places.insert(1, Place(others._replace(name="other trainer"), trainers - 1, on_gpu and (trainers - 1) * shared))
    driver = (Place(Process("driver", (Term("libraries and text", DRIVER),)), 1, 0),) if _has_driver(plan) else ()
    helpers = (Place(Process("Ray's own", (Term("Ray's processes", RAY),)), 1, 0),) if _has_driver(plan) else ()
    return Stage("training", (*places, *driver, *helpers), shared)


def _analysis(config: RunConfig, plan: Plan, info: ModelInfo, at_once: int) -> Stage:
    """Its fuller part: the pass for features, or that of the whole model, which follows it."""
    on_gpu, actors = plan.device == "cuda", _actors_on_a_node(plan)
    passes = feature_actor(config, info, on_gpu, at_once), whole_actor(config, info, on_gpu)
    fuller = max(passes, key=lambda process: (process.gpu_bytes, process.main_bytes))
    main = max(passes, key=lambda process: process.main_bytes).main
    actor = fuller._replace(main=main).times(actors, "cluster.num_model_actors", plan.shares_gpu)
    places = [Place(actor, actors, on_gpu and (actors if plan.shares_gpu else 1))]
    if _has_driver(plan):
        places.append(Place(analysis_driver(config, info), 1, 0))
    return Stage("analysis", tuple(places), plan.shares_gpu)


def _at_once(config: RunConfig, plan: Plan, info: ModelInfo, main: float, gpu: float) -> int:
    """At least 1, also where that does not fit."""
    actors, driver = _actors_on_a_node(plan), analysis_driver(config, info).main_bytes * _has_driver(plan)
    each_main = (main - driver) / actors if main else math.inf
    each_gpu = gpu / (actors if plan.shares_gpu else 1) if gpu else math.inf
    return max(1, most_at_once(config, info, plan.device == "cuda", each_main, each_gpu))


def _actors_on_a_node(plan: Plan) -> int:
    """Most model actors on one node: on CPUs they are on all alike, on GPUs near the trainer while there is room."""
    if plan.device == "cpu" or plan.shares_gpu:
        return -(-plan.num_model_actors // len(plan.nodes))
    room = int(max(node.gpus for node in plan.nodes))
    return max(1, min(plan.max_model_actors, room - (1 if plan.spread else plan.num_trainers)))


def _has_driver(plan: Plan) -> bool:
    """Whether the fullest node has the driver: the only one of a cluster, and not one without the head."""
    return len(plan.nodes) == 1 and not plan.not_on


class _Short(NamedTuple):
    """What does not fit."""

    stage: Stage
    terms: list[Counted]
    """All that is in the same memory."""
    room: float
    """Bytes of that memory."""
    kind: str
    owner: str


def _short(stages: Sequence[Stage], main: float, gpu: float) -> list[_Short]:
    """All that does not fit, where it is known what there is."""
    kinds = [_Short(stage, stage.main(), main, "main memory", "the largest node") for stage in stages]
    kinds += [_Short(stage, terms, gpu, "a GPU's memory", "a GPU") for stage in stages for terms in stage.gpus()]
    return [each for each in kinds if each.room and _sum(each.terms) > each.room]


def _refuse(stages: Sequence[Stage], main: float, gpu: float, more: str = "") -> None:
    """Raises ConfigError for what fits least, if anything does not; `more` is advice besides."""
    if not (short := _short(stages, main, gpu)):
        return
    stage, terms, room, kind, owner = max(short, key=lambda each: _sum(each.terms) / each.room)
    raise ConfigError(
        f"{_fields(terms)}: the {stage.name} takes {gb(_sum(terms))} of {kind} ({_largest_terms(terms)}), {owner} has "
        f"{gb(room)}; {_advice([(each.terms, _sum(each.terms) - each.room) for each in short])}{more}"
    )


def _more_trainers(config: RunConfig, plan: Plan, info: ModelInfo) -> str:
    """The fewest trainers that would divide the transcoders so that all fits, as advice; empty if there are none."""
    gpus = sum(int(node.gpus) for node in plan.nodes)
    for number in range(plan.num_trainers + 1, 1 + min(len(config.members()), gpus)):
        settings = config.cluster.model_copy(update={"num_trainers": number})
        more = config.model_copy(update={"cluster": settings})
        try:
            found = memory_plan(more, make_plan(more, plan.nodes, info.d_model), info)
        except ConfigError:
            break  # there are not so many GPUs
        if split_of(more, number) == "transcoders" and not _short(found.stages, found.main, found.gpu):
            return f"; or with cluster.num_trainers={number}, which divide the transcoders"
    return ""


def _fields(terms: Sequence[Counted]) -> str:
    """The fields that the largest term goes by."""
    largest = max((each for each in terms if each.term.fields), key=lambda each: each.bytes)
    return " and ".join(f"{name}{_amount(name, value)}" for name, value in largest.term.fields)


def _largest_terms(terms: Sequence[Counted]) -> str:
    largest = sorted(terms, key=lambda each: -each.bytes)[:NAMED]
    return ", ".join(
        f"{f'{each.number} x ' if each.number > 1 else ''}{gb(each.term.bytes)} {each.owner}: {each.term.what}"
        for each in largest
    )


def _advice(short: Sequence[tuple[Sequence[Counted], float]]) -> str:
    """What of a field alone would make all fit that does not, each given with the bytes that it lacks; other fields
    held as they are."""
    fits: dict[tuple[str, int], int] = {}
    names: dict[str, None] = {}
    for number, (terms, lacking) in enumerate(short):
        by_field: dict[tuple[str, int], int] = {}
        for each in terms:
            for field in each.term.fields:
                by_field[field] = by_field.get(field, 0) + each.bytes
        most = {field: _rounded(field[1] * (1 - lacking / size)) for field, size in by_field.items() if size}
        fits = {
            f: min(value, fits.get(f, value)) for f, value in most.items() if value >= 1 and (f in fits or not number)
        }
        names |= dict.fromkeys(name for name, _ in sorted(by_field, key=lambda field: -by_field[field]))
    if not fits:
        return f"no field alone makes it fit: change several of {', '.join(names)}"
    best = sorted(fits, key=lambda field: fits[field] / field[1], reverse=True)[:OFFERED]
    return "it would fit with " + ", or with ".join(f"{name}{_amount(name, fits[name, value])}" for name, value in best)


def _amount(name: str, value: int) -> str:
    """A field's value, or how many it asks for where it is a list; nothing of the language model's name."""
    if name == MODEL[0][0]:
        return ""
    transcoders = "transcoders" if value > 1 else "transcoder"
    words = {"model.layers": transcoders, "sweep": transcoders, "transcoder.group_sizes": "features in all"}
    return f" of {value:,} {words[name]}" if name in words else f"={value}"


def _rounded(value: float) -> int:
    """Two digits, downwards."""
    if value < 100:
        return int(value)
    step = 10 ** (int(math.log10(value)) - 1)
    return int(value // step * step)


def _check_disk(config: RunConfig, info: ModelInfo, room: float | None) -> None:
    count = len(config.members())
    if room is None:
        room = shutil.disk_usage(tempfile.gettempdir()).free
    needed = analysis_bytes(config, info).disk(count)
    if needed > room:
        raise ConfigError(
            f"analysis.num_tokens={config.analysis.num_tokens}: what is found of {count} transcoders waits on the "
            f"driver's disk and takes up to {gb(needed)} there, {tempfile.gettempdir()} has {gb(room)}; "
            "set TMPDIR to a larger one, or lower analysis.max_per_feature"
        )


def _sum(terms: Iterable[Counted]) -> int:
    return sum(each.bytes for each in terms)


def _of(needed: float, room: float) -> str:
    return f"{gb(needed)} of {gb(room)}" if room else f"{gb(needed)} of ?"


def _largest(sizes: Iterable[float]) -> float:
    """The largest of what is known of all; 0 otherwise."""
    known = list(sizes)
    return max(known, default=0.0) if all(known) else 0.0
