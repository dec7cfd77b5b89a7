"""Memory that training takes, in each of its processes. Without torch.

B tokens of a trainer's share of a batch, F features and P parameters of a transcoder, d the width of the language
model, T positions of a work unit, S matrices [T, d] that are read of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cluster.memory_terms import (
    BFLOAT16,
    CUDA_CONTEXT,
    CUDA_MAIN,
    FLOAT,
    LIBRARIES,
    MODEL,
    Process,
    Term,
    dictionary_fields,
    layer_fields,
    model_item,
    site_count,
    transcoder_words,
    unit_fields,
    unit_positions,
)
from cluster.placement import placed_members, split_of
from mtc.config import RunConfig

if TYPE_CHECKING:
    from mtc.language_model.architectures import ModelInfo

ENTRY = 80
"""Bytes of all that is noted of a chosen entry: token, feature, order, value, gradient (mtc.transcoder.sparse_loss)."""
DENSE_COPIES = 4
"""Matrices [B, F] float32 that the dense step holds at a time: pre-activations, activations, and the gradients of both
(mtc.transcoder.dense_loss). On a CPU the sparse step's first one needs as much: with no border known yet it lists all
positive entries (mtc.transcoder.selection)."""
INITIAL_ROWS, INITIAL_BYTES = 16_384, 24
"""Tokens that a transcoder starts from (mtc.training.in_memory), and bytes of a number of theirs: both sites as they
came, the target and its square in float64 or the source in float32 and float64 (MatryoshkaTranscoder.initialise)."""
GPU_BORDER = 9
"""Bytes of an entry of [B, F] while a GPU chooses: z, the copy that topk reads, and what is at the border
(mtc.transcoder.selection)."""
PIECE = 64
"""Entries that a GPU sums one after another (mtc.transcoder.products)."""
SAVES, SAVES_OF_SEVERAL = 2, 3
"""Copies of a transcoder's file while it is made, safetensors' own and the bytes; of several also the one before
(mtc.storage.checkpoints.CheckpointWriter)."""
NORM_COPIES, GATED_COPIES, PLAIN_COPIES = 3, 3, 4
"""Matrices of [T, d] float32 that a norm holds, and of [T, width] that an MLP does: gate, up and their product, or what
GPT-2's activation function works with."""
SCORES_BYTES = 6
"""Bytes of a pair of tokens and head beside the score itself, where scores are capped: their softmax in float32 and as
it is used (mtc.language_model.attention.pattern)."""


class TrainingBytes(NamedTuple):
    """Bytes that one trainer takes, the largest where they divide the transcoders; where it computes, but for
    `checkpoint`."""

    weights: int
    """Weights, gradients, Adam's two moments, counts of silence; where several trainers have them all, the buckets that
    gradients are averaged in."""
    work: int
    """What a step works with, or the first rows if that is more than gradients, moments and a step's work."""
    buffer: int
    """The trainer's share of the shuffle buffer."""
    units: int
    """Units by which the buffer's blocks are longer than their share and, with repeats, one that waits for room
    (mtc.training.shuffle_buffer); on a GPU besides one that waits, one that is copied and one that is taken in
    (mtc.training.upload), which on a CPU are views of the object store."""
    checkpoint: int
    """Main memory of rank 0, or of each trainer with transcoders of its own: the copy of weights and moments from which
    a checkpoint is written, and the bytes that are made of one transcoder at a time."""

    @property
    def device(self) -> int:
        """All that lies where the trainer computes."""
        return self.weights + self.work + self.buffer + self.units


def parameters(config: RunConfig, d_model: int) -> int:
    """P of `config.transcoder`: encoder, decoder, their biases, a skip connection's matrix, thresholds where they are
    trained (mtc.transcoder.transcoder)."""
    settings, features = config.transcoder, config.transcoder.num_features
    more = (d_model**2 if settings.skip else 0) + (features if settings.activation == "jumprelu" else 0)
    return 2 * d_model * features + features + d_model + more


def training_bytes(
    config: RunConfig, info: ModelInfo, trainers: int, on_gpu: bool = False, threads: int = 1
) -> TrainingBytes:
    """What each of so many trainers takes, which steps with so many threads."""
    configs, divided = dict(config.members()), split_of(config, trainers) == "transcoders"
    placed = placed_members(config, trainers) if divided else [list(configs)]
    shares = [[configs[name] for name in mine] for mine in placed]
    found = [_share_bytes(config, info, share, trainers, divided, on_gpu, threads) for share in shares]
    return TrainingBytes(*(max(parts) for parts in zip(*found, strict=True)))


def _share_bytes(
    config: RunConfig, info: ModelInfo, members: Sequence[RunConfig], trainers: int, divided: bool, on_gpu: bool,
    threads: int,
) -> TrainingBytes:  # fmt: skip
    """What a trainer of these transcoders takes: on its share of each batch, or on the whole where they are divided."""
    d, rows = info.d_model, config.optimizer.batch_tokens if divided else -(-config.optimizer.batch_tokens // trainers)
    share, unit = config.data.shuffle_buffer_tokens // trainers // (config.data.replays + 1), unit_positions(config)
    kept, transient, started, counts, sizes = 0, [0], 0, 0, []
    received = 2 * BFLOAT16 * d * len(members) if divided else 0  # a row of what other trainers send (cluster.routing)
    for member in members:
        settings, features = member.transcoder, member.transcoder.num_features
        aux = int(settings.aux_coefficient > 0)
        slots, entries = len(settings.group_sizes) + aux, rows * (settings.k + aux * settings.aux_k)
        z, residuals = FLOAT * rows * features, FLOAT * rows * slots * d
        copies = (3 * FLOAT + 2 * BFLOAT16) * rows * d  # source and target as they come, x, y, y without massive tokens
        dense = DENSE_COPIES * FLOAT * rows * features
        if on_gpu:  # there the allocator keeps memory, which transcoders use in turn
            choose = GPU_BORDER * rows * features + BFLOAT16 * (features + rows) * d
            sums = FLOAT * d * (features + entries // PIECE)  # of pieces, before they are put together
            step = residuals * 2 + copies + ENTRY * entries + max(choose, sums + z)
            transient.append(max(step, dense + copies) if member.optimizer.backend == "dense" else step)
        else:
            kept += z + residuals + ENTRY * entries
            transient.append(dense + copies)
        first = min(INITIAL_ROWS, share + unit) * (trainers if divided else 1)
        neurons = 3 * FLOAT * info.mlp_width * d if settings.init == "mlp" else 0
        drawn = FLOAT * d * (2 * features + 2 * min(first, 2 * features))
        started = max(started, first * (d * INITIAL_BYTES + received) + neurons + drawn)
        sizes.append(parameters(member, d))
        counts += 9 * features  # how long each is silent, int64, and which are dead
    steps_at_once = 1 if on_gpu else max(1, min(threads, len(sizes)))
    work = kept + sum(sorted(transient, reverse=True)[:steps_at_once]) + rows * received
    moments = (FLOAT * 4 if trainers > 1 and not divided else FLOAT * 3) * sum(sizes)
    copy = 2 * FLOAT * sum(sizes) + FLOAT * sum(sizes) + counts
    saves = SAVES_OF_SEVERAL if len(sizes) > 1 else SAVES
    token, blocks = site_count(config) * d * BFLOAT16, config.data.replays + 1
    return TrainingBytes(
        weights=FLOAT * sum(sizes) + moments + counts,
        work=max(work, started - moments),
        buffer=blocks * share * token,
        units=(blocks + (config.data.replays > 1) + 3 * on_gpu) * unit * token,
        checkpoint=copy + saves * 3 * FLOAT * max(sizes),
    )


def trainer(config: RunConfig, info: ModelInfo, trainers: int, on_gpu: bool, threads: int = 1) -> Process:
    """Rank 0; the others lack the copy for a checkpoint, unless each has transcoders of its own."""
    need = training_bytes(config, info, trainers, on_gpu, threads)
    whose, fields = transcoder_words(config), dictionary_fields(config)
    terms: tuple[Term, ...] = (
        Term(f"{whose}weights, gradients and moments", need.weights, fields),
        Term("a step's work", need.work, (("optimizer.batch_tokens", config.optimizer.batch_tokens),)),
        Term(
            f"shuffle buffer with data.replays={config.data.replays}", need.buffer,
            (("data.shuffle_buffer_tokens", config.data.shuffle_buffer_tokens), *layer_fields(config)),
        ),
    )  # fmt: skip
    terms += (Term("units in the buffer" + " and on their way" * on_gpu, need.units, unit_fields(config)),)
    copy = Term(f"{whose}copy for a checkpoint", need.checkpoint, fields)
    libraries = Term("libraries", LIBRARIES)
    if not on_gpu:
        return Process("trainer", (libraries, copy, *terms))
    unit = unit_fields(config)
    staged = 2 * site_count(config) * _pinned(unit_positions(config) * info.d_model * BFLOAT16)
    main = (libraries, Term("CUDA", CUDA_MAIN), copy, Term("units on their way", staged, unit))
    return Process("trainer", main, (Term("CUDA", CUDA_CONTEXT), *terms))


def model_actor(config: RunConfig, info: ModelInfo, on_gpu: bool) -> Process:
    """A model actor while it captures: layers 0 to the deepest that is read, and a unit's activations. No key or value
    is kept (`use_cache` is false), and nothing is spent on logits."""
    item, unit = model_item(config, on_gpu), unit_positions(config)
    layers = max(sites.layer for sites in config.model.sites) + 1
    model = Term(f"language model, layers 0 to {layers - 1}", item * info.weights(layers), MODEL)
    work = Term("a unit's activations", capture_bytes(config, info, on_gpu), unit_fields(config))
    libraries = Term("libraries", LIBRARIES)
    if not on_gpu:
        return Process("model actor", (libraries, model, work))
    staged = 2 * site_count(config) * _pinned(unit * info.d_model * BFLOAT16)
    loading = model._replace(what=f"{model.what}, while it is loaded")
    later = Term("units on their way", staged, unit_fields(config))
    main = (libraries, Term("CUDA", CUDA_MAIN), max(loading, later, key=lambda term: term.bytes))
    return Process("model actor", main, (Term("CUDA", CUDA_CONTEXT), model, work))


def capture_bytes(config: RunConfig, info: ModelInfo, on_gpu: bool) -> int:
    """A unit's activations when they take most: in its last layer, or while the sites are copied out of the pass
    (mtc.language_model.model.capture) and, from float32, rounded (mtc.language_model.capture). A GPU holds an earlier
    unit besides, which is on its way to the host."""
    item, unit = model_item(config, on_gpu), unit_positions(config)
    site = unit * site_count(config) * info.d_model
    rounded = 0 if item == BFLOAT16 else BFLOAT16
    inside = pass_bytes(config, info, on_gpu) + item * site
    return max(inside, (2 * item + rounded) * site) + (BFLOAT16 * site if on_gpu else 0)


def pass_bytes(config: RunConfig, info: ModelInfo, on_gpu: bool) -> int:
    """What a layer of a unit's forward pass holds: the residual stream before and after, and the larger of its MLP, its
    norm in float32, and its attention with queries, keys and values before and after they are turned; where scores are
    capped (Gemma 2) and no kernel does it, as on CPUs, those of all pairs."""
    item, unit = model_item(config, on_gpu), unit_positions(config)
    mlp = (GATED_COPIES if info.gated else PLAIN_COPIES) * info.mlp_width * item
    norm = NORM_COPIES * info.d_model * FLOAT
    attention = 2 * (info.attention_width + 2 * info.key_width) * item
    if info.model_type == "gemma2" and not on_gpu:
        attention += info.heads * config.data.context_length * (item + SCORES_BYTES)
    return unit * (2 * info.d_model * item + max(mlp, norm, attention))


def unit_bytes(config: RunConfig, info: ModelInfo) -> int:
    """A unit in the object store (cluster.blocks)."""
    return unit_positions(config) * site_count(config) * info.d_model * BFLOAT16


def stream_bytes(config: RunConfig, info: ModelInfo) -> int:
    """All of a run's activations: what the object store holds at most, which the stream otherwise fills."""
    tokens = config.data.num_tokens + config.fresh_tokens + unit_positions(config)
    return tokens * site_count(config) * info.d_model * BFLOAT16


def _pinned(count: int) -> int:
    """Bytes of pinned memory that torch takes for so many: the next power of two."""
    return 1 << (count - 1).bit_length()
