"""The inference threshold, from fresh tokens after training: k entries per token exceed it on average.

BatchTopK chooses among the tokens of a batch; at inference each token stands alone, and a threshold takes its place
(Bussmann et al. 2024, arXiv:2412.06410). Where features compete with z times the norm of their decoder row, the border
t of that is found, and t / norm is the threshold of each feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtc.transcoder import MatryoshkaTranscoder, agree, kth_largest

CALIBRATION_ROWS = 4096
"""Tokens to take in at a time, so that memory stays small."""


class Calibrator:
    """Finds the inference threshold: the activation that k entries per token exceed, on fresh tokens of all ranks; of
    a Shard's transcoder on all tokens, which every rank takes in.

    It keeps the strongest pre-activations of each batch, so memory is a small multiple of k per token; exact as long as
    no batch needs more than `headroom` times its share.
    """

    def __init__(self, transcoder: MatryoshkaTranscoder, headroom: int = 4):
        self.transcoder = transcoder
        self.headroom = headroom
        self.tokens = 0
        self.strongest: list[Tensor] = []

    @torch.no_grad()
    def add(self, source: Tensor) -> None:
        """Take in raw source activations [tokens, d_source]."""
        if not len(source):
            return
        z = self.transcoder.pre_activations(source.to(self.transcoder.W_enc.device))
        if (scale := self.transcoder.rank_scale()) is not None:
            z.mul_(scale)  # in the same memory
        z = z.flatten()
        share = min(z.numel(), self.headroom * self.transcoder.shape.k * len(source))
        border = z.topk(share).values[-1]
        self.strongest.append(z[(z >= border) & (z > 0)])
        self.tokens += len(source)

    @torch.no_grad()
    def finish(self) -> float:
        """Set the threshold, or one for each feature, and return what z, or z times the norm of the decoder row, must
        exceed; call on every rank."""
        device = self.transcoder.W_enc.device
        shared = self.transcoder.shard is None  # otherwise every rank has had all tokens, for its own features
        (total,) = agree(self.tokens) if shared else [self.tokens]
        values = torch.cat([*self.strongest, torch.zeros(0, device=device)])
        # Entries strictly above the threshold are active, so it is the first value that is not among the k per token.
        border = float(kth_largest(values, self.transcoder.shape.k * int(total) + 1))
        scale = self.transcoder.rank_scale()
        if scale is None:
            self.transcoder.threshold.fill_(border)
        else:
            # A feature whose decoder row is 0 contributes nothing, so it must not fire: no number is above this one.
            never = torch.finfo(torch.float32).max
            self.transcoder.threshold = torch.where(scale > 0, border / scale, never)
        return border
