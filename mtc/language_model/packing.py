"""Windows of several lengths as one batch that the language model runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


class PackedWindows(NamedTuple):
    """Windows of any lengths as one row of tokens, without padding."""

    input_ids: torch.Tensor
    """[tokens] int64, one window after another."""
    position_ids: torch.Tensor
    """[tokens] int64, position of each token in its window, from 0."""
    trainable: torch.Tensor
    """[tokens] bool: the token is neither BOS nor another special one."""
    lengths: tuple[int, ...]
    """Tokens of each window."""


def pack_windows(windows: Sequence[NDArray[np.int32]], special: Sequence[int]) -> PackedWindows:
    """Lay windows one after another; tokens among the `special` ids are not trainable."""
    import torch  # here, because the processes that read and tokenise text do not need it

    lengths = np.array([len(window) for window in windows], dtype=np.int64)
    ids = np.concatenate([*windows, np.empty(0, np.int32)]).astype(np.int64)
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    trainable = ~np.isin(ids, special)
    return PackedWindows(
        torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(trainable), tuple(lengths.tolist())
    )
