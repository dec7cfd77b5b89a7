"""Work units through the language model and back to the host, one unit being computed while an earlier one is copied.

On a GPU nothing here waits for the device but `finish`: kernels are started, and copies into pinned memory follow on a
stream of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mtc.config import SiteKey
from mtc.devices import Stopwatch, current_stream, is_gpu, on_stream, pinned, record, side_stream, used_on

if TYPE_CHECKING:
    from mtc.language_model.model import LanguageModel
    from mtc.language_model.packing import PackedWindows


class Pending(NamedTuple):
    """A unit whose forward pass was started."""

    activations: dict[SiteKey, Tensor]
    """[tokens, d_model] bfloat16 by layer and site, on the host once the copy is over; empty without windows."""
    sums: Tensor
    """[sites, tokens] float32, sums over d_model: not finite where an activation is not."""
    copied: Any
    """Event at which the activations are on the host; None on a CPU."""
    watch: Stopwatch
    """Stopwatch of the forward pass."""
    positions: int
    """Tokens that the forward pass took, special ones included."""
    flops: float
    """Floating-point operations of the forward pass's matrix products."""


class Captured(NamedTuple):
    """A unit's activations on the host."""

    activations: dict[SiteKey, Tensor]
    """[tokens, d_model] bfloat16 by layer and site, of the tokens whose activations are all finite at every site."""
    tokens: int
    """Trainable tokens of the unit, those that are left out included."""
    dropped: list[int]
    """Numbers of the trainable tokens that are left out because an activation is not finite."""


class Capture:
    """Runs one language model over work units, and reads its sites at all trainable tokens."""

    def __init__(self, model: LanguageModel):
        self.model = model
        on_gpu = is_gpu(model.device)
        self.ahead = 1 if on_gpu else 0
        """How many units are worth starting before an earlier one is finished."""
        self._stream = side_stream(model.device) if on_gpu else None

    def start(self, windows: PackedWindows) -> Pending:
        """Run the model on a unit; on a GPU this returns before it is done. A unit without windows only holds a
        place."""
        watch = Stopwatch(self.model.device)
        with watch.running():
            if windows.lengths:
                pairs = self.model.capture(windows, windows.trainable.nonzero().squeeze(1))
                found = {}
                for sites, pair in zip(self.model.config.sites, pairs, strict=True):
                    found[sites.source_key] = pair.source.to(torch.bfloat16)
                    found[sites.target_key] = pair.target.to(torch.bfloat16)
                sums = torch.stack([rows.sum(1, dtype=torch.float32) for rows in found.values()])
            else:
                found, sums = {}, torch.zeros(0, device=self.model.device)
        flops = self.model.flops(windows.lengths)
        (sums, *copies), copied = self._to_host([sums, *found.values()])
        activations = dict(zip(found, copies, strict=True))
        return Pending(activations, sums, copied, watch, sum(windows.lengths), flops)

    def finish(self, pending: Pending) -> Captured:
        """Wait until a unit that was started is on the host."""
        if pending.copied is not None:
            pending.copied.synchronize()  # not the stream: the next unit is on it too
        activations = pending.activations
        tokens = pending.sums.shape[-1]
        if bool(pending.sums.isfinite().all()):
            return Captured(activations, tokens, [])
        finite = torch.ones(tokens, dtype=torch.bool)
        for rows in activations.values():
            finite &= rows.isfinite().all(1)
        dropped: list[int] = (~finite).nonzero().squeeze(1).tolist()
        return Captured({key: rows[finite] for key, rows in activations.items()}, tokens, dropped)

    def _to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Copy activations from a GPU into pinned memory, on a stream of its own; returns them and the event at which
        they are there."""
        if self._stream is None:
            return tensors, None
        self._stream.wait_stream(current_stream(self.model.device))
        copies = []
        with on_stream(self._stream):
            for tensor in tensors:
                copies.append(pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True))
                used_on(tensor, self._stream)
            copied = record(self._stream)
        return copies, copied
