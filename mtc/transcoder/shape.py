"""What a transcoder's weights file says of it beside the weights."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from mtc.config import RunConfig


class TranscoderShape(NamedTuple):
    """Sizes and settings of a transcoder that its weights file needs to be read again."""

    d_source: int
    d_target: int
    group_sizes: tuple[int, ...]
    k: int
    input_norm: str
    skip: bool = False
    """Whether an affine map of the source is added to every reconstruction."""
    activation: str = "batch_topk"
    """Name of the activation function in `mtc.transcoder.activations.ACTIVATIONS`."""
    rank: str = "activation"
    """What entries compete with: `activation`, or `contribution`, times the norm of the feature's decoder row."""

    def cut(self, prefix: int) -> TranscoderShape:
        """The shape of the nested dictionary of the first `prefix` features; raises ValueError if there is none."""
        prefixes = list(accumulate(self.group_sizes))
        if prefix not in prefixes:
            raise ValueError(f"prefix={prefix} is not one of the nested dictionaries {prefixes}")
        if self.activation == "topk" and prefix != prefixes[-1]:
            raise ValueError(f"prefix={prefix}: features of a TopK transcoder compete with all others; read it whole")
        return self._replace(group_sizes=self.group_sizes[: prefixes.index(prefix) + 1])


def transcoder_shape(config: RunConfig, d_source: int, d_target: int) -> TranscoderShape:
    """The shape that a configuration gives a transcoder of one layer."""
    t = config.transcoder
    return TranscoderShape(d_source, d_target, t.group_sizes, t.k, config.input_norm, t.skip, t.activation, t.rank)
