"""The language model with the MLPs of all layers that are read replaced at once: what a set of transcoders is worth.

Each is judged alone where the other layers are the model's own (mtc.analysis.loss_sums). Here layers above read what
the errors of those below made, so errors add up. In every layer the prefix of the same number is used. As there, only
trainable positions are replaced: BOS and other special tokens keep what the MLP gives at their position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtc.analysis.intervals import intervals
from mtc.analysis.loss_sums import Clean, pieces, replacing
from mtc.analysis.token_sums import Array, sum_by_label
from mtc.results import ReplacedLayers
from mtc.transcoder import MatryoshkaTranscoder

if TYPE_CHECKING:
    from mtc.language_model import LanguageModel, PackedWindows

Replacement = Callable[[Tensor], Tensor]


class ReplacedSums(NamedTuple):
    """Sums over predicted tokens by label, float64."""

    tokens: Array
    """[labels], predicted tokens."""
    ce: Array
    """[labels, 3 + prefixes], sums of the cross-entropies in nats: clean, and with the MLPs of all layers that are read
    replaced by zero, by their mean, by each prefix's reconstruction."""
    kl: Array
    """[labels, prefixes], sums of KL(clean || replaced) in nats."""
    agrees: Array
    """[labels, prefixes], tokens whose most likely next token is the clean model's."""

    def __add__(self, other: object) -> ReplacedSums:
        assert isinstance(other, ReplacedSums)
        return ReplacedSums(*(a + b for a, b in zip(self, other, strict=True)))


@torch.inference_mode()
def replaced_sums(
    model: LanguageModel,
    transcoders: Sequence[MatryoshkaTranscoder],
    windows: PackedWindows,
    target_means: Sequence[Tensor],
    labels: Tensor | None = None,
    num_labels: int = 1,
) -> ReplacedSums:
    """Sums of a few windows; the transcoders are those of the model's `config.sites`, one for each and in their order,
    with as many prefixes each. The other arguments are those of `loss_sums`."""
    if labels is None:
        labels = torch.zeros(len(windows.input_ids), dtype=torch.int64)
    found = pieces(model, windows, labels)
    sums = [_sums(model, transcoders, part, target_means, own, num_labels, piece) for part, own, piece in found]
    return reduce(add, sums)


def replaced_layers(
    sums: ReplacedSums, layers: Sequence[int], prefixes: Sequence[int], documents: int
) -> ReplacedLayers:
    """The record of sums whose labels are documents, or blocks of `documents` documents in all."""
    ce, kl, agrees = (part[sums.tokens > 0] for part in (sums.ce, sums.kl, sums.agrees))
    each = sums.tokens[sums.tokens > 0]
    clean, zero, mean, *replaced = (ce.sum(0) / each.sum()).tolist()

    def per_token(of: Array) -> Callable[[Array], Array]:
        return lambda weights: (weights @ of) / (weights @ each)[:, None]

    return ReplacedLayers(
        layers=tuple(layers),
        prefixes=tuple(prefixes),
        tokens=int(each.sum()),
        documents=documents,
        ce_clean=clean,
        ce_zero=zero,
        ce_mean=mean,
        ce_replaced=tuple(replaced),
        ce_interval=intervals(per_token(ce[:, 3:]), len(each)),
        kl=tuple((kl.sum(0) / each.sum()).tolist()),
        kl_interval=intervals(per_token(kl), len(each)),
        agreement=tuple((agrees.sum(0) / each.sum()).tolist()),
        agreement_interval=intervals(per_token(agrees), len(each)),
    )


def _sums(
    model: LanguageModel,
    transcoders: Sequence[MatryoshkaTranscoder],
    windows: PackedWindows,
    target_means: Sequence[Tensor],
    labels: Tensor,
    num_labels: int,
    labelled: Tensor,
) -> ReplacedSums:
    """ReplacedSums of the predictions of the tokens with the indices `labelled`."""
    by_label = sum_by_label(labels[labelled].to(model.device), num_labels)

    def run(replacements: Sequence[Replacement]) -> Tensor:
        replaced = {at: replacing(windows, each, model.device) for at, each in enumerate(replacements)}
        return model.logits(windows, replaced, labelled - 1)

    logits = model.logits(windows, None, labelled - 1)
    clean, likeliest = Clean(logits, windows.input_ids[labelled].to(model.device)), _likeliest(logits)
    ce = [by_label(clean.cross_entropy)]
    for fixed in ([torch.zeros_like(mean) for mean in target_means], target_means):
        logits = run([lambda s, y=y: y.to(s.device).float().expand(len(s), -1) for y in fixed])  # type: ignore[misc]
        ce.append(by_label(clean.cross_entropy_of(logits)))
    kl, agrees = list[Array](), list[Array]()
    for prefixes in zip(*(transcoder.prefixes for transcoder in transcoders), strict=True):
        reconstructed = zip(transcoders, prefixes, strict=True)
        logits = run([lambda s, t=t, m=m: t.reconstruct(s, m) for t, m in reconstructed])  # type: ignore[misc]
        for sums, values in zip((ce, kl), clean.beside(logits), strict=True):
            sums.append(by_label(values))
        agrees.append(by_label((_likeliest(logits) == likeliest).float()))
    ones = by_label(torch.ones(len(labelled), device=model.device))
    return ReplacedSums(ones, *(np.stack(part, 1) for part in (ce, kl, agrees)))


def _likeliest(logits: Tensor) -> Tensor:
    """[tokens] int64; `max` is several times faster than `argmax` on a CPU."""
    return logits.max(1).indices
