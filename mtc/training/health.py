"""What goes wrong in training without an error: spikes of the loss, a collapsing L0, steps without finite gradients."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtc.training.trainer import StepMetrics

SPIKE = 3.0
"""Factor on the median of the last HISTORY rows above which a loss is a spike."""
COLLAPSE = 0.5
"""Share of k below which an L0 has collapsed: fewer entries than that are positive at all."""
HISTORY = 50
LEAST_HISTORY = 5


class Health:
    """Looks at one transcoder's steps, in order; says when a trouble begins, once."""

    def __init__(self, k: int, skipped: int = 0):
        """Trouble with `skipped` steps is known already."""
        self.k = k
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._spiking = False
        self._collapsed = False
        self._skipped = skipped

    def look(self, row: StepMetrics, loss: float, l0: float) -> list[tuple[str, str]]:
        """(kind, message) of what has begun since the last row; `loss` is the highest and `l0` the lowest since then,
        this row's included."""
        found = []
        if row.skipped > self._skipped:
            found.append(
                (
                    "steps_skipped",
                    f"{row.skipped - self._skipped} steps had no finite gradient and changed no weights, "
                    f"{row.skipped} in all",
                )
            )
        self._skipped = row.skipped
        usual = statistics.median(self._losses) if len(self._losses) >= LEAST_HISTORY else None
        spiking = usual is not None and not loss <= SPIKE * usual
        if spiking and not self._spiking:
            found.append(("loss_spike", f"loss {loss:.4g}, {SPIKE:g} times the usual {usual:.4g} or more"))
        if math.isfinite(row.loss) and (usual is None or row.loss <= SPIKE * usual):
            self._losses.append(row.loss)
        collapsed = l0 < COLLAPSE * self.k
        if collapsed and not self._collapsed:
            found.append(("l0_collapse", f"l0 {l0:.2f}, less than {COLLAPSE:g} of k {self.k}"))
        self._spiking, self._collapsed = spiking, collapsed
        return found
