"""Memory that training and analysis take, held against what there is before any work is done. Without torch.

Of a trainer a lower bound: transcoders with all that training them needs, and the shuffle buffer. The language model
and the libraries come besides. Of the analysis an estimate that is rather too high: how many transcoders one pass over
the held-out text is for goes by it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cluster.placement import placed_members, split_of
from cluster.resources import Plan
from mtc.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from mtc.language_model.architectures import ModelInfo

FLOAT, BFLOAT16, ENTRY = 4, 2, 80
"""Bytes of a float32, of a bfloat16, and of all that is noted of a chosen entry: token, feature, order, value and
gradient."""
DENSE_COPIES = 4
"""Matrices of [tokens, features] float32 that the dense step holds at a time."""


FLOAT64 = 8
EXAMPLE = 24
"""Bytes of a stored example beside its context's activations."""
CONTEXT_ENTRY = 20
"""Bytes of an activation in a random context."""
STATISTICS = 40
"""Numbers of 8 bytes that are counted of each feature."""
LABELS = 2 * (1024 + 18 + 10)
"""Rows of sums by document, by position and by frequency, of massive tokens and of others."""
FOLDS = 5
UNITS_PER_ROW, ROWS_WANTED = 8, 16
"""Most work units of a row of held-out work, and rows of a short text (cluster.held_out)."""
PROCESS = 600_000_000
"""Bytes of a process with the libraries, before it does anything."""
COPIES = 3
"""Of one transcoder's sums: themselves, as arrays that travel, and as the bytes of these."""


PROMPT_TOKENS, MAX_FEATURES, GRAPH_COPIES = 12, 4096, 4
"""Of the graphs of held-out prompts (cluster.graph_scores): tokens of a prompt, most features with edges of their own,
and how often the matrix of edges is there while shares and influence are computed."""


class TrainingBytes(NamedTuple):
    """Bytes that one trainer takes, the largest where they divide the transcoders."""

    transcoders: int
    """Weights, gradients, Adam's two moments and what a step works with, where the trainer computes."""
    buffer: int
    """The shuffle buffer when it is fullest, where the trainer computes."""
    checkpoint: int
    """The copy of weights and moments in main memory from which a checkpoint is written: rank 0 has it, where trainers
    divide the transcoders each of its own."""

    @property
    def device(self) -> int:
        """All that lies where the trainer computes."""
        return self.transcoders + self.buffer


def training_bytes(config: RunConfig, d_model: int, trainers: int, on_gpu: bool = False) -> TrainingBytes:
    """What each of so many trainers takes."""
    whole, configs = split_of(config, trainers) == "transcoders", dict(config.members())
    rows = config.optimizer.batch_tokens if whole else -(-config.optimizer.batch_tokens // trainers)
    shares = [[configs[name] for name in mine] for mine in placed_members(config, trainers)]
    found = [_transcoder_bytes(share, d_model, rows, on_gpu) for share in shares]
    buffer = _buffer_bytes(config, d_model, trainers)
    return TrainingBytes(max(need for need, _ in found), buffer, max(checkpoint for _, checkpoint in found))


def _transcoder_bytes(configs: Sequence[RunConfig], d_model: int, rows: int, on_gpu: bool) -> tuple[int, int]:
    """What one trainer's transcoders take on steps of so many rows, and a checkpoint's copy of them."""
    parameters = dense = 0
    held: list[int] = []
    for member in configs:
        settings, features = member.transcoder, member.transcoder.num_features
        parameters += 2 * d_model * features + features + d_model + (d_model**2 if settings.skip else 0)
        held.append(FLOAT * rows * (features + (len(settings.group_sizes) + 1) * d_model) + ENTRY * rows * settings.k)
        # `auto` tries it on a CPU; on a GPU it goes by what was recorded.
        if member.optimizer.backend == "dense" or (member.optimizer.backend == "auto" and not on_gpu):
            dense = max(dense, DENSE_COPIES * FLOAT * rows * features)
    work = max(held) if on_gpu else sum(held)  # there transcoders step in turn, and none keeps its work
    return 4 * FLOAT * parameters + work + dense, 3 * FLOAT * parameters


def check_main_memory(config: RunConfig, plan: Plan, d_model: int) -> None:
    """Raises ConfigError if no node has the main memory for its trainers; nodes of unknown memory do."""
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return
    need = training_bytes(config, d_model, plan.num_trainers, plan.device == "cuda")
    together = 1 if plan.spread else plan.num_trainers
    copies = together if plan.transcoders else 1
    wanted = copies * need.checkpoint + (together * need.device if plan.device == "cpu" else 0)
    if wanted > max(known):
        beside = f" for {together} trainers" if together > 1 else ""
        raise ConfigError(
            f"{_asked(config, need)}: training takes at least {_gb(wanted)} of main memory{beside} "
            f"({_parts(config, need)}), the largest node has {_gb(max(known))}; {_advice(config, need)}"
        )


def check_gpu_memory(config: RunConfig, plan: Plan, d_model: int, memory: int) -> None:
    """Raises ConfigError if a GPU of `memory` bytes is too small for a trainer, and a shared one for the language
    model's layers beside it."""
    need = training_bytes(config, d_model, plan.num_trainers, on_gpu=True)
    wanted, shared = need.device, 0
    if plan.shares_gpu:
        wanted *= plan.num_trainers
        shared = 2 * 12 * d_model**2 * (max(sites.layer for sites in config.model.sites) + 1) * plan.num_model_actors
    if wanted + shared > memory:
        beside = f" beside {_gb(shared)} of the language model" if shared else ""
        raise ConfigError(
            f"{_asked(config, need)}: training takes at least {_gb(wanted)} of a GPU's memory ({_parts(config, need)})"
            f"{beside}, a GPU has {_gb(memory)}; {_more_trainers(config, plan, need)}{_advice(config, need)}"
        )


class AnalysisBytes(NamedTuple):
    """Bytes that the pass over held-out text takes."""

    model: int
    """The language model with all of its layers."""
    weights: int
    """The largest transcoder's weights."""
    activations: int
    """One work unit's activations of one layer."""
    line: int
    """The affine map's sums of a row of work."""
    counts: int
    """Other sums of the largest transcoder, which have the same size whatever is in them."""
    found: int
    """What else a row finds of it, such as candidate examples."""
    kept: int
    """What all rows together find of that."""
    rows: int
    """Rows of work."""
    waiting: int
    """Transcoders whose sums a model actor holds at a time, for each that a pass is for: 0 where every row is one work
    unit, 1 otherwise."""

    def actor(self, transcoders: int) -> int:
        """Main memory of a model actor whose passes are for so many transcoders."""
        sums = self.line + self.counts + self.found
        each = self.weights + self.activations + self.waiting * sums
        return PROCESS + self.model + transcoders * each + COPIES * sums

    @property
    def driver(self) -> int:
        """The driver, whose memory has one transcoder at a time."""
        return PROCESS + self.weights + 2 * (FOLDS * self.line + self.counts + self.kept)

    def disk(self, transcoders: int) -> int:
        """What waits on the driver's disk."""
        return transcoders * (FOLDS * self.line + self.rows * self.found)


def analysis_bytes(config: RunConfig, info: ModelInfo) -> AnalysisBytes:
    """What the analysis of a run takes; of several transcoders the largest counts for all."""
    settings, d, data = config.analysis, info.d_model, config.data
    item = FLOAT if config.model.dtype == "float32" else BFLOAT16
    largest = max((member.config.transcoder for member in config.members()), key=lambda t: t.num_features)
    features, prefixes = largest.num_features, len(largest.group_sizes)
    unit = max(data.unit_tokens, data.context_length)
    units = max(1, -(-settings.num_tokens // unit))
    per_row = max(1, min(UNITS_PER_ROW, units // ROWS_WANTED))
    line = 2 * FLOAT64 * (d + 1) ** 2 * 2  # of massive tokens apart
    labels = LABELS * (d + 4 * prefixes) * FLOAT64
    vocabulary = info.num_ids * (1 + prefixes) * FLOAT64
    statistics = (info.num_ids + features * STATISTICS) * FLOAT64
    kept = features * (settings.max_per_feature + settings.samples_per_feature)
    example, fired = EXAMPLE + FLOAT * settings.context_tokens, per_row * unit * largest.k
    in_contexts = min(settings.random_contexts * (settings.context_tokens + 1), settings.num_tokens) * largest.k
    return AnalysisBytes(
        model=item * (12 * d**2 * info.num_layers + info.num_ids * d),
        weights=FLOAT * (2 * d * features + features + d + (d**2 if largest.skip else 0)),
        activations=2 * unit * d * item,
        line=line,
        counts=labels + vocabulary,
        found=statistics + min(kept, fired) * example + min(in_contexts, fired) * CONTEXT_ENTRY,
        kept=statistics + kept * example + in_contexts * CONTEXT_ENTRY,
        rows=-(-units // per_row),
        waiting=int(per_row > 1),
    )


def transcoders_at_once(config: RunConfig, plan: Plan, info: ModelInfo) -> int:
    """For how many of the run's transcoders one pass over the held-out text can be: all, or as many as fit into the
    memory of the plan's nodes.

    Raises ConfigError if not even one fits, if the transcoders' weights do not, which the whole language model is run
    with, or if the driver's disk has no room for what is found of all.
    """
    need, count = analysis_bytes(config, info), len(config.members())
    if plan.device == "cuda":  # there these are, of which nothing is counted here
        need = need._replace(model=0, weights=0, activations=0)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if need.disk(count) > room:
        raise ConfigError(
            f"analysis.num_tokens={config.analysis.num_tokens}: what is found of {count} transcoders waits on the "
            f"driver's disk and takes up to {_gb(need.disk(count))} there, {tempfile.gettempdir()} has {_gb(room)}; "
            "set TMPDIR to a larger one, or lower analysis.max_per_feature"
        )
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return count
    on_one = -(-plan.num_model_actors // len(plan.nodes))
    free = (max(known) - need.driver) / on_one
    fixed = need.actor(0)
    each = need.actor(1) - fixed
    whole = fixed + count * need.weights
    at_once = int((free - fixed) / each) if each else count if fixed <= free else 0
    if at_once < 1 or whole > free:
        raise ConfigError(
            f"the analysis takes at least {_gb(max(need.actor(1), whole))} of main memory for each of {on_one} model "
            f"actors on a node (the language model {_gb(need.model)}, {count} transcoders' weights "
            f"{_gb(count * need.weights)}, one's sums {_gb(need.line + need.counts + need.found)} and activations "
            f"{_gb(need.activations)}) and {_gb(need.driver)} for the driver; the largest node has {_gb(max(known))}: "
            "lower cluster.num_model_actors, data.unit_tokens or analysis.max_per_feature"
        )
    return min(count, at_once)


def graph_bytes(config: RunConfig, info: ModelInfo) -> int:
    """Main memory of a process that scores attribution graphs: the language model in float32, all transcoders, and a
    graph's edges with the copies that shares and influence take."""
    transcoders = [member.config.transcoder for member in config.members()]
    weights = sum(analysis_bytes(member.config, info).weights for member in config.members())
    places = sum(min(t.k, t.num_features) for t in transcoders) + info.num_layers + 1
    edges = min(MAX_FEATURES, PROMPT_TOKENS * places) * PROMPT_TOKENS * places
    model = 12 * info.d_model**2 * info.num_layers + info.num_ids * info.d_model
    return PROCESS + weights + FLOAT * (model + GRAPH_COPIES * edges)


def graph_processes(config: RunConfig, plan: Plan, info: ModelInfo) -> int:
    """How many processes can score graphs at once: as many as there are model actors, as far as their memory fits; 0 if
    not even one's does. One on a GPU, whose memory is not asked: there it takes seconds."""
    if plan.device == "cuda":
        return 1
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return plan.num_model_actors
    return min(plan.num_model_actors, sum(int(memory / graph_bytes(config, info)) for memory in known))


def _buffer_bytes(config: RunConfig, d_model: int, trainers: int) -> int:
    """`data.replays` + 1 blocks, each up to a work unit larger than its share, and with repeats a unit that waits for
    room."""
    data = config.data
    blocks, unit = data.replays + 1, max(data.unit_tokens, data.context_length)
    rows = blocks * (data.shuffle_buffer_tokens // trainers // blocks + unit) + unit * (data.replays > 1)
    sites = {key for part in config.model.sites for key in (part.source_key, part.target_key)}
    return rows * len(sites) * d_model * BFLOAT16


def _asked(config: RunConfig, need: TrainingBytes) -> str:
    """The field that takes most."""
    if need.buffer > need.transcoders:
        return f"data.shuffle_buffer_tokens={config.data.shuffle_buffer_tokens} with data.replays={config.data.replays}"
    count, fields = len(config.members()), "sweep" if config.sweep else "model.layers"
    return f"{fields} asks for {count} transcoders" if count > 1 else "transcoder.group_sizes"


def _parts(config: RunConfig, need: TrainingBytes) -> str:
    return (
        f"for each {_gb(need.transcoders)} of weights, gradients, Adam's moments and work, {_gb(need.buffer)} of "
        f"shuffle buffer; {_gb(need.checkpoint)} for a checkpoint's copy"
    )


def _advice(config: RunConfig, need: TrainingBytes) -> str:
    if need.buffer > need.transcoders:
        return "lower data.shuffle_buffer_tokens"
    fewer = "train fewer at a time, or smaller ones" if len(config.members()) > 1 else "lower transcoder.group_sizes"
    return f"{fewer}, or lower optimizer.batch_tokens={config.optimizer.batch_tokens}"


def _more_trainers(config: RunConfig, plan: Plan, need: TrainingBytes) -> str:
    """Advice where more trainers would each have fewer transcoders."""
    divided = config.cluster.split != "tokens" and plan.num_trainers < len(config.members()) and not plan.shares_gpu
    return "raise cluster.num_trainers, which divide them, " if divided and need.transcoders > need.buffer else ""


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
