"""Sums of the language model's next-token loss with its MLP output replaced: clean, ablated to zero or to the mean, and
spliced with each prefix's reconstruction. Float64, so that parts of the text can be measured by different processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtc.analysis.token_sums import sum_by_label
from mtc.transcoder import MatryoshkaTranscoder

if TYPE_CHECKING:
    from mtc.language_model import LanguageModel, PackedWindows
    from mtc.language_model.sites import Replace

Array = NDArray[Any]
MAX_LOGITS = 1 << 26  # held at a time on a CPU, a few copies of them: the vocabulary is what fills the memory
CACHED_LOGITS = 1 << 18
"""Logits whose few float32 copies stay in a core's cache."""


class LossSums(NamedTuple):
    """Sums of cross-entropies and KL over predicted tokens by label, float64."""

    tokens: Array
    """[labels] float64, predicted tokens."""
    ce: Array
    """[labels, 3 + prefixes] float64, sums of the cross-entropies in nats: clean, zero-ablated, mean-ablated, spliced
    per prefix."""
    kl: Array
    """[labels, prefixes] float64, sums of KL(clean || spliced) in nats."""
    norm_scale: Array
    """[labels] float64, sum of 1 / rms of what the final norm read in the clean run (around its mean for a
    LayerNorm)."""

    def __add__(self, other: object) -> LossSums:
        assert isinstance(other, LossSums)
        return LossSums(*(a + b for a, b in zip(self, other, strict=True)))

    def weighted(self, weights: Array) -> LossSums:
        """Sums of the labels combined with `weights` [results, labels]: one label per result."""
        return LossSums(*(np.tensordot(weights, column, 1) for column in self))

    def nonempty(self) -> LossSums:
        """Sums of only those labels that have tokens."""
        return LossSums(*(column[self.tokens > 0] for column in self))

    def recovered(self, ablation: int) -> Array:
        """[labels, prefixes]: (CE_ablated - CE_spliced) / (CE_ablated - CE_clean); `ablation` 1 is to zero, 2 to the
        mean."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ablated = self.ce[:, ablation, None]
            return (ablated - self.ce[:, 3:]) / (ablated - self.ce[:, :1])


def max_logits(device: torch.device) -> int:
    """Logits to hold at a time: MAX_LOGITS, on a GPU more where its memory has room. A few copies of them are made.

    Each pass for a few more tokens costs a GPU as much as one for many.
    """
    if device.type != "cuda":
        return MAX_LOGITS
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps what it had
    return _logits_in(torch.cuda.mem_get_info(device)[0] + unused)


@torch.inference_mode()
def loss_sums(
    model: LanguageModel,
    transcoders: Sequence[MatryoshkaTranscoder],
    windows: PackedWindows,
    target_means: Sequence[Tensor],
    labels: Tensor | None = None,
    num_labels: int = 1,
    sites: Sequence[int] | None = None,
) -> list[LossSums]:
    """Cross-entropies of a few windows, for each transcoder in turn.

    `sites` says for each transcoder at which entry of the model's `config.sites` it is, by default one at each.
    Transcoders at the same one share its clean and ablated passes, with the mean of the first of them. `model` has its
    upper layers and head, `target_means` are [d_target], `labels` [tokens] int64 say what each token is counted under.
    Only trainable positions are replaced: BOS is never trained on, so its MLP output stays the model's own.
    """
    if labels is None:
        labels = torch.zeros(len(windows.input_ids), dtype=torch.int64)
    sites = range(len(transcoders)) if sites is None else sites
    sums = [
        _loss_sums(model, transcoders, part, target_means, own, num_labels, piece, sites)
        for part, own, piece in pieces(model, windows, labels)
    ]
    return [reduce(add, same) for same in zip(*sums, strict=True)]


def pieces(
    model: LanguageModel, windows: PackedWindows, labels: Tensor
) -> Iterator[tuple[PackedWindows, Tensor, Tensor]]:
    """Windows in parts whose logits fit into memory: whole windows, their labels, and the indices of the tokens in them
    whose prediction is judged."""
    at_once = max(1, max_logits(model.device) // model.vocab_size)
    for part, own in _split(windows, labels, at_once):
        # A token is predicted from the one before it in its window, which position 0 does not have.
        predicted = (part.trainable & (part.position_ids > 0)).nonzero().squeeze(1)
        # Of a window that is longer than the limit a piece at a time: the passes are run again for each.
        for piece in predicted.split(at_once):
            yield part, own, piece


def replacing(windows: PackedWindows, replacement: Callable[[Tensor], Tensor], device: torch.device) -> Replace:
    """A `mtc.language_model` replacement of the trainable positions' mlp_out by `replacement(source)`, [trainable,
    d_source] -> [trainable, d_target]; all others, BOS among them, keep their own."""
    trainable = windows.trainable.nonzero().squeeze(1).to(device)

    def replace(source: Tensor, target: Tensor) -> Tensor:
        changed = target.clone()
        changed[trainable] = replacement(source[trainable]).to(target.dtype)
        return changed

    return replace


def _logits_in(free: int) -> int:
    """Logits whose float32 values fill a sixteenth of `free` bytes, as a power of 2, at least MAX_LOGITS.

    The divergence holds five copies of them, and two processes may share the GPU.
    A power of 2, so that a little more or less of what is free does not change the parts, and with them last digits.
    """
    return max(MAX_LOGITS, 1 << max(0, (free // 64).bit_length() - 1))


def _loss_sums(
    model: LanguageModel,
    transcoders: Sequence[MatryoshkaTranscoder],
    windows: PackedWindows,
    target_means: Sequence[Tensor],
    labels: Tensor,
    num_labels: int,
    labelled: Tensor,
    sites: Sequence[int],
) -> list[LossSums]:
    """LossSums of the predictions of the tokens with the indices `labelled`."""
    by_label = sum_by_label(labels[labelled].to(model.device), num_labels)

    def run(replacement: Callable[[Tensor], Tensor], at: int) -> Tensor:
        return model.logits(windows, replacing(windows, replacement, model.device), labelled - 1, at)

    with model.same_windows(windows):
        with model.watch_final_norm() as scales:
            clean = Clean(model.logits(windows, None, labelled - 1), windows.input_ids[labelled].to(model.device))
        tokens = by_label(torch.ones(len(labelled), device=model.device))
        scale = by_label(scales[0][(labelled - 1).to(model.device)])
        results = []
        unspliced: dict[int, list[Array]] = {}
        for transcoder, mean, at in zip(transcoders, target_means, sites, strict=True):
            if at not in unspliced:
                fixed = (torch.zeros_like(mean), mean)
                ablated = (run(lambda s, y=y: y.to(s.device).float().expand(len(s), -1), at) for y in fixed)  # type: ignore[misc]
                unspliced[at] = [by_label(clean.cross_entropy), *(by_label(clean.cross_entropy_of(z)) for z in ablated)]
            ce, kl = list(unspliced[at]), list[Array]()
            for m in transcoder.prefixes:
                found = clean.beside(run(lambda s, m=m, t=transcoder: t.reconstruct(s, m), at))  # type: ignore[misc]
                for sums, values in zip((ce, kl), found, strict=True):
                    sums.append(by_label(values))
            results.append(LossSums(tokens, np.stack(ce, 1), np.stack(kl, 1), scale))
    return results


class Clean:
    """What the clean pass predicts, with which others are compared, a few tokens at a time: in a CPU's cache that is
    several times faster than all at once. `logits` are [tokens, vocabulary]; `next_ids` [tokens] come after them."""

    def __init__(self, logits: Tensor, next_ids: Tensor):
        self._next_ids = next_ids
        self._at_once = max(1, (CACHED_LOGITS if logits.device.type == "cpu" else logits.numel()) // logits.shape[1])
        # Of the clean pass once, not for every one that it is compared with: half of the time.
        self._log_p = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        for log_p, part in zip(self._log_p.split(self._at_once), logits.split(self._at_once), strict=True):
            log_p.copy_(part.float().log_softmax(1))
        self.cross_entropy = -self._log_p.gather(1, next_ids.unsqueeze(1)).squeeze(1)
        """[tokens] float32, -log p of the next token."""

    def beside(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and KL(clean || other) of each token in nats, [tokens] float32, of other logits."""
        found = []
        for log_p, log_q, ids in self._parts(logits):
            found.append((_of_next(log_q, ids), log_p.exp().mul_(log_p - log_q).sum(1)))
        cross_entropy, kl = map(torch.cat, zip(*found, strict=True))
        return cross_entropy, kl

    def cross_entropy_of(self, logits: Tensor) -> Tensor:
        """The first of what `beside` gives alone, which takes half of the time."""
        return torch.cat([_of_next(log_q, ids) for _, log_q, ids in self._parts(logits)])

    def _parts(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """log p, log q and the next ids of a few tokens."""
        parts = (whole.split(self._at_once) for whole in (self._log_p, logits, self._next_ids))
        for log_p, other, ids in zip(*parts, strict=True):
            yield log_p, other.float().log_softmax(1), ids


def _of_next(log_q: Tensor, ids: Tensor) -> Tensor:
    return -log_q.gather(1, ids.unsqueeze(1)).squeeze(1)


def _split(windows: PackedWindows, labels: Tensor, tokens: int) -> Iterator[tuple[PackedWindows, Tensor]]:
    """A batch of windows cut into parts of whole windows with at most this many tokens each, or one window; and their
    labels."""
    start, end = 0, 0
    first = 0
    for i, length in enumerate(windows.lengths):
        if end > start and end + length - start > tokens:
            yield _part(windows, start, end, first, i), labels[start:end]
            start, first = end, i
        end += length
    yield _part(windows, start, end, first, len(windows.lengths)), labels[start:end]


def _part(windows: PackedWindows, start: int, end: int, first: int, last: int) -> PackedWindows:
    return windows._replace(
        input_ids=windows.input_ids[start:end],
        position_ids=windows.position_ids[start:end],
        trainable=windows.trainable[start:end],
        lengths=windows.lengths[first:last],
    )
