"""Pre-activations of a batch: all by one product, which may be rounded to bfloat16, and some of them exactly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from mtc.transcoder.objective import Weights
from mtc.transcoder.products import Workspace, entry_dots


class PreActivations(NamedTuple):
    """x W_enc^T + b_enc of a batch, without gradients."""

    z: Tensor
    """[tokens, features], in x's dtype; its values are bfloat16's if `rounded`."""
    x: Tensor
    """[tokens, d_source], normalised source."""
    weights: Weights
    """Weights that z was computed with."""
    rounded: bool
    """Whether z was computed in bfloat16, so that it only proposes entries."""

    def exact(self, token: Tensor, feature: Tensor) -> Tensor:
        """[entries], z at some entries in x's dtype; `token` is non-decreasing."""
        return entry_dots(self.x, token, self.weights.W_enc, feature) + self.weights.b_enc[feature]

    def rounding(self) -> Tensor:
        """[features], by how much the exact z may be larger than z, or smaller, near 0 or near b_enc.

        Factors, products and biases are each rounded by at most 2^-9 of themselves, and |x . w| <= ||x|| ||w||.
        """
        largest = self.x.norm(dim=1).amax() if len(self.x) else self.x.new_zeros(())
        return 2**-7 * (largest * self.weights.W_enc.norm(dim=1) + self.weights.b_enc.abs())


def pre_activations(x: Tensor, weights: Weights, workspace: Workspace, bfloat16: bool) -> PreActivations:
    """Of x [tokens, d_source]; z lies in the workspace's memory and goes back there as "z"."""
    if bfloat16 and x.device.type != "cpu":  # where the sums of products need not be rounded to bfloat16 again
        z = torch.mm(x.bfloat16(), weights.W_enc.bfloat16().t(), out_dtype=x.dtype).add_(weights.b_enc)
        return PreActivations(z, x, weights, True)
    z = workspace.take("z", (len(x), len(weights.b_enc)), x)
    if bfloat16:
        z.copy_(linear(x.bfloat16(), weights.W_enc.bfloat16(), weights.b_enc.bfloat16()))
    else:
        torch.addmm(weights.b_enc, x, weights.W_enc.t(), out=z)
    return PreActivations(z, x, weights, bfloat16)
