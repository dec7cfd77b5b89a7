"""Memory that the analysis takes, and for how many transcoders one pass over the held-out text can be. Without torch.

An estimate that is rather too high: sums are counted as if each feature had all the examples that are kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from cluster.memory_terms import (
    CUDA_CONTEXT,
    CUDA_MAIN,
    DRIVER,
    FLOAT,
    FLOAT64,
    LIBRARIES,
    MODEL,
    Process,
    Term,
    dictionary_fields,
    model_item,
    total,
    transcoder_words,
    unit_positions,
)
from cluster.memory_training import pass_bytes
from cluster.resources import Plan
from mtc.config import RunConfig

if TYPE_CHECKING:
    from mtc.language_model.architectures import ModelInfo

EXAMPLE = 24
"""Bytes of a stored example beside its context's activations."""
CONTEXT_ENTRY = 20
"""Bytes of an activation in a random context."""
STATISTICS = 40
"""Numbers of 8 bytes that are counted of each feature."""
LABELS = 2 * (1024 + 18 + 10)
"""Rows of sums by document, by position and by frequency, of massive tokens and of others."""
SAMPLED = 28
"""Bytes of an activation of the sample for co-activations (mtc.analysis.coactivation.CoactivationSample)."""
COSINES, COSINE = 1 << 25, 8
"""Cosines between features that are held at a time (mtc.analysis.feature_table), and bytes of one and its copy."""
FOLDS = 5
UNITS_PER_ROW, ROWS_WANTED = 8, 16
"""Most work units of a row of held-out work, and rows of a short text (cluster.held_out)."""
COPIES = 3
"""Of one transcoder's sums: themselves, as arrays that travel, and as the bytes of these."""


MAX_LOGITS = 1 << 26
"""Logits that are held at a time (mtc.analysis.loss_sums): of the clean pass as log-probabilities in float32, of
another in the model's dtype. A GPU takes more where its memory has room."""
SPLICED_COPIES = 3
"""Matrices [tokens, features] float32 while a reconstruction is spliced in: pre-activations, which are active, and the
activations (MatryoshkaTranscoder.encode)."""
MAX_ENTRIES, ENTRY = 1 << 26, 5
"""Entries of [tokens, features] that are encoded at a time (mtc.analysis.token_sums), and bytes of one: its value, and
whether it is active."""
PROMPT_TOKENS, MAX_FEATURES, GRAPH_COPIES = 12, 4096, 4
"""Of the graphs of held-out prompts (cluster.graph_scores): tokens of a prompt, most features with edges of their own,
and how often the matrix of edges is there while shares and influence are computed."""


class AnalysisBytes(NamedTuple):
    """Bytes that the pass over held-out text takes."""

    model: int
    """The language model with all of its layers."""
    lower: int
    """The language model up to the deepest layer that is read."""
    weights: int
    """The largest transcoder's weights."""
    activations: int
    """One work unit's activations of one layer."""
    work: int
    """What a forward pass holds in a layer, or the entries of all features that are encoded at a time."""
    logits: int
    """Log-probabilities of the whole model, and what is compared with them: logits, or while these are made the
    activations of all features that are spliced in."""
    line: int
    """The affine map's sums of a row of work."""
    counts: int
    """Other sums of the largest transcoder, which have the same size whatever is in them."""
    found: int
    """What else a row finds of it: candidate examples, contexts, the sample for co-activations."""
    kept: int
    """What all rows together find of that."""
    cosines: int
    """Cosines between features that the driver compares at a time."""
    rows: int
    """Rows of work."""
    waiting: int
    """Transcoders whose sums a model actor holds at a time, for each that a pass is for: 0 where every row is one work
    unit, 1 otherwise."""

    @property
    def sums(self) -> int:
        """One transcoder's sums in a row of work, on the host."""
        return self.line + self.counts + self.found

    @property
    def driver(self) -> int:
        """The driver, whose memory has one transcoder at a time."""
        return DRIVER + self.weights + self.cosines + 2 * (FOLDS * self.line + self.counts + self.kept)

    def disk(self, transcoders: int) -> int:
        """What waits on the driver's disk."""
        return transcoders * (FOLDS * self.line + self.rows * self.found)


def analysis_bytes(config: RunConfig, info: ModelInfo, on_gpu: bool = False) -> AnalysisBytes:
    """What the analysis of a run takes; of several transcoders the largest counts for all."""
    settings, d = config.analysis, info.d_model
    item = model_item(config, on_gpu)
    largest = max((member.config.transcoder for member in config.members()), key=lambda t: t.num_features)
    features, prefixes = largest.num_features, len(largest.group_sizes)
    unit = unit_positions(config)
    judged = max(1, min(unit, MAX_LOGITS // info.num_ids))
    units = max(1, -(-settings.num_tokens // unit))
    per_row = max(1, min(UNITS_PER_ROW, units // ROWS_WANTED))
    line = 2 * FLOAT64 * (d + 1) ** 2 * 2  # of massive tokens apart
    labels = LABELS * (d + 4 * prefixes) * FLOAT64
    vocabulary = info.num_ids * (1 + prefixes) * FLOAT64
    statistics = (info.num_ids + features * STATISTICS) * FLOAT64
    kept = features * (settings.max_per_feature + settings.samples_per_feature)
    example, fired = EXAMPLE + FLOAT * settings.context_tokens, per_row * unit * largest.k
    in_contexts = min(settings.random_contexts * (settings.context_tokens + 1), settings.num_tokens) * largest.k
    sampled = min(settings.coactivation_tokens, settings.num_tokens) * largest.k
    return AnalysisBytes(
        model=item * info.weights(info.num_layers, head=True),
        lower=item * info.weights(max(sites.layer for sites in config.model.sites) + 1),
        weights=FLOAT * (2 * d * features + features + d + (d**2 if largest.skip else 0)),
        activations=2 * unit * d * item,
        work=max(pass_bytes(config, info, on_gpu), ENTRY * min(unit * features, MAX_ENTRIES)),
        logits=judged * (FLOAT * info.num_ids + max(item * info.num_ids, SPLICED_COPIES * FLOAT * features)),
        line=line,
        counts=labels + vocabulary,
        found=statistics
        + min(kept, fired) * example
        + min(in_contexts, fired) * CONTEXT_ENTRY
        + min(sampled, fired) * SAMPLED,
        kept=statistics + kept * example + in_contexts * CONTEXT_ENTRY + sampled * SAMPLED,
        cosines=COSINE * min(features**2, COSINES),
        rows=-(-units // per_row),
        waiting=int(per_row > 1),
    )


def feature_actor(config: RunConfig, info: ModelInfo, on_gpu: bool, transcoders: int) -> Process:
    """A model actor whose pass over the held-out text is for so many transcoders (cluster.held_out.FeatureActor)."""
    need = analysis_bytes(config, info, on_gpu)
    fields, unit = dictionary_fields(config), (("data.unit_tokens", config.data.unit_tokens),)
    examples = (("analysis.max_per_feature", config.analysis.max_per_feature), *unit)
    sums = Term("sums and examples", (COPIES + transcoders * need.waiting) * need.sums, examples)
    computing = (
        Term("language model", need.lower, MODEL),
        Term(f"{transcoders} transcoders' weights", transcoders * need.weights, fields[-1:]),
        Term("a unit's activations", transcoders * need.activations + need.work, unit),
    )
    return _process("model actor", computing, (sums,), on_gpu)


def whole_actor(config: RunConfig, info: ModelInfo, on_gpu: bool) -> Process:
    """A model actor with the whole language model and all transcoders (cluster.held_out.WholeModelActor)."""
    need, count = analysis_bytes(config, info, on_gpu), len(config.members())
    unit = (("data.unit_tokens", config.data.unit_tokens),)
    computing = (
        Term("language model", need.model, MODEL),
        Term(f"{transcoder_words(config)}weights", count * need.weights, dictionary_fields(config)),
        Term("a layer's activations", pass_bytes(config, info, on_gpu), unit),
        Term("logits", need.logits),
    )
    return _process("model actor", computing, (), on_gpu)


def analysis_driver(config: RunConfig, info: ModelInfo) -> Process:
    """The driver while it merges what was found, one transcoder at a time."""
    need = analysis_bytes(config, info)
    fields = (("analysis.max_per_feature", config.analysis.max_per_feature),)
    found = Term("sums and examples", need.driver - DRIVER, fields)
    return Process("driver", (Term("libraries and text", DRIVER), found))


def most_at_once(config: RunConfig, info: ModelInfo, on_gpu: bool, main: float, gpu: float) -> int:
    """For how many of the run's transcoders one pass over the held-out text can be: all, or as many as fit into what a
    model actor has of main memory and, on a GPU, of that; 0 if not even one's does."""
    count = len(config.members())
    one, more = (feature_actor(config, info, on_gpu, transcoders) for transcoders in (1, 2))
    for room, first, second in ((main, one.main, more.main), (gpu, one.gpu, more.gpu)):
        each, fixed = total(second) - total(first), 2 * total(first) - total(second)
        if total(first) > room:
            return 0
        if each and room < math.inf:
            count = min(count, int((room - fixed) / each))
    return count


def graph_bytes(config: RunConfig, info: ModelInfo) -> int:
    """Main memory of a process that scores attribution graphs: the language model in float32, all transcoders, and a
    graph's edges with the copies that shares and influence take."""
    transcoders = [member.config.transcoder for member in config.members()]
    weights = sum(analysis_bytes(member.config, info).weights for member in config.members())
    places = sum(min(t.k, t.num_features) for t in transcoders) + info.num_layers + 1
    edges = min(MAX_FEATURES, PROMPT_TOKENS * places) * PROMPT_TOKENS * places
    return LIBRARIES + weights + FLOAT * (info.weights(info.num_layers, head=True) + GRAPH_COPIES * edges)


def graph_processes(config: RunConfig, plan: Plan, info: ModelInfo) -> int:
    """How many processes can score graphs at once: as many as there are model actors, as far as their memory fits; 0 if
    not even one's does. One on a GPU, whose memory is not asked: there it takes seconds."""
    if plan.device == "cuda":
        return 1
    known = [node.memory for node in plan.nodes if node.memory]
    if len(known) < len(plan.nodes):
        return plan.num_model_actors
    return min(plan.num_model_actors, sum(int(memory / graph_bytes(config, info)) for memory in known))


def _process(name: str, computing: tuple[Term, ...], held: tuple[Term, ...], on_gpu: bool) -> Process:
    """What is computed with lies where the process computes, what is `held` in main memory; a language model for a GPU
    passes through main memory before that is held."""
    libraries = Term("libraries", LIBRARIES)
    if not on_gpu:
        return Process(name, (libraries, *computing, *held))
    loading = computing[0]._replace(what=f"{computing[0].what}, while it is loaded")
    later = max((loading,), held, key=total)
    return Process(name, (libraries, Term("CUDA", CUDA_MAIN), *later), (Term("CUDA", CUDA_CONTEXT), *computing))
