"""Work units through the language model and back to the host, one unit being computed while an earlier one is copied.

On a GPU nothing here waits for the device but `finish`: kernels are started, and copies into pinned memory follow on a
stream of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtc.devices import Stopwatch, current_stream, is_gpu, on_stream, pinned, record, side_stream, used_on
from mtc.language_model.model import LanguageModel
from mtc.language_model.packing import PackedWindows


class Pending(NamedTuple):
    """A unit whose forward pass was started."""

    columns: list[Tensor]
    """Source and target of each layer, [tokens, d_model] bfloat16, on the host once the copy is over."""
    sums: Tensor
    """[columns, tokens] float32, sums over d_model: not finite where an activation is not."""
    copied: Any
    """The event at which they are on the host; None on a CPU."""
    watch: Stopwatch
    """Of the forward pass."""
    positions: int
    """Tokens that it took, special ones included."""
    flops: float
    """Operations of its matrix products."""


class Captured(NamedTuple):
    """A unit's activations on the host."""

    columns: list[Tensor]
    """Source and target of each layer, [tokens, d_model] bfloat16, of the tokens whose activations are all finite."""
    tokens: int
    """Trainable tokens of the unit."""
    dropped: list[int]
    """The numbers of those that are left out because an activation is not finite."""


class Capture:
    """Runs one language model, whose sites it reads at all trainable tokens."""

    def __init__(self, model: LanguageModel):
        self.model = model
        on_gpu = is_gpu(model.device)
        self.ahead = 1 if on_gpu else 0
        """Units that are worth starting before an earlier one is finished."""
        self._stream = side_stream(model.device) if on_gpu else None

    def start(self, windows: PackedWindows) -> Pending:
        """Run the model; on a GPU this returns before it is done. No windows make a unit that only holds a place."""
        watch = Stopwatch(self.model.device)
        with watch.running():
            if windows.lengths:
                pairs = self.model.capture(windows, windows.trainable.nonzero().squeeze(1))
                columns = [column.to(torch.bfloat16) for pair in pairs for column in pair]
                sums = torch.stack([column.sum(1, dtype=torch.float32) for column in columns])
            else:
                columns, sums = [], torch.zeros(0, device=self.model.device)
        flops = self.model.flops(windows.lengths)
        (sums, *columns), copied = self._to_host([sums, *columns])
        return Pending(columns, sums, copied, watch, sum(windows.lengths), flops)

    def finish(self, pending: Pending) -> Captured:
        """Wait until the unit is on the host."""
        if pending.copied is not None:
            pending.copied.synchronize()  # not the stream: the next unit is on it too
        columns = pending.columns
        tokens = len(columns[0]) if columns else 0
        if bool(pending.sums.isfinite().all()):
            return Captured(columns, tokens, [])
        finite = columns[0].isfinite().all(1)
        for column in columns[1:]:
            finite &= column.isfinite().all(1)
        dropped: list[int] = (~finite).nonzero().squeeze(1).tolist()
        return Captured([column[finite] for column in columns], tokens, dropped)

    def _to_host(self, columns: list[Tensor]) -> tuple[list[Tensor], Any]:
        """From a GPU into pinned memory, on a stream of its own, and the event at which they are there."""
        if self._stream is None:
            return columns, None
        self._stream.wait_stream(current_stream(self.model.device))
        copies = []
        with on_stream(self._stream):
            for column in columns:
                copies.append(pinned(column.shape, column.dtype).copy_(column, non_blocking=True))
                used_on(column, self._stream)
            copied = record(self._stream)
        return copies, copied
