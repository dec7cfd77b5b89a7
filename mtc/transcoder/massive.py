"""Massive tokens: those whose target is many times longer than the usual one.

At some layers a few tokens have targets hundreds of times as long as the median, along one direction, and hold half of
the variance or more (massive activations: Sun et al. 2024, arXiv:2402.17762). The norm alone tells them: they are no
particular tokens and stand in no particular place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtc.transcoder.distributed import all_gather

MASSIVE_RATIO = 5.0
"""Norm of a target, in median norms, above which its token is massive."""


def massive_norm(target: Tensor) -> Tensor:
    """Scalar float32: MASSIVE_RATIO times the median norm of all ranks' raw targets, [tokens, d_target] each.

    Of an even number the median is the lower of the two in the middle. Equal however tokens are spread over ranks;
    NaN without any.
    """
    norms = torch.linalg.vector_norm(target.float(), dim=1)
    sizes = all_gather(torch.tensor(len(norms)))
    padded = norms.new_full((int(sizes.max()),), torch.nan)
    padded[: len(norms)] = norms
    return MASSIVE_RATIO * all_gather(padded).nanmedian()


def above(target: Tensor, norm: Tensor) -> Tensor:
    """[tokens] bool: the raw targets [tokens, d_target] that are longer than `norm`; none if that is NaN."""
    return torch.linalg.vector_norm(target.float(), dim=1) > norm


def cap(target: Tensor, norm: Tensor) -> Tensor:
    """[tokens] float32, `norm` / ||target|| of the raw targets [tokens, d_target] that are longer, 1 of the others; all
    1 if `norm` is NaN."""
    lengths = torch.linalg.vector_norm(target.float(), dim=1)
    return torch.where(lengths > norm, norm / lengths, 1.0)
