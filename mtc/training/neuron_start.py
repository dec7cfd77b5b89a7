"""Which of the MLP's neurons a transcoder's features start from: the strongest first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtc.transcoder import agree, all_reduce

if TYPE_CHECKING:
    from mtc.language_model import Neurons

TOKENS = 2048  # at a time, so that memory stays small


@torch.no_grad()
def strongest_directions(neurons: Neurons, source: Tensor) -> Tensor:
    """Directions of the neurons [neurons, d_source] float32, those first whose part of `mlp_out` varies most over all
    ranks' raw sources [tokens, d_source]: variance of the activity times the squared length of what it adds."""
    neurons = neurons.to(source.device)
    sums = torch.zeros(2, len(neurons.directions), dtype=torch.float64, device=source.device)
    for some in source.split(TOKENS):
        activity = neurons.activity(some)
        sums += torch.stack([activity.sum(0), activity.square().sum(0)])
    all_reduce(sums)
    (tokens,) = agree(len(source))
    mean, square = sums / tokens
    strength = (square - mean.square()) * neurons.out_norms.double().square()
    return neurons.directions[strength.argsort(descending=True, stable=True)]
