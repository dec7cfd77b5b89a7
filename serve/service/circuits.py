"""Attribution graphs, steering and ablation of one run at a time: without HTTP and without Ray.

Graphs are computed one after another by one thread; prompts are steered, and features taken out of texts, beside them.
All take turns on one model, a graph after every few features.
"""

from __future__ import annotations

from serve.contract import CircuitMetrics, RunKey, Settings
from serve.service.ablating import Ablations
from serve.service.circuit_model import CircuitModel, Load, load_replacement
from serve.service.graph_jobs import Graphs
from serve.service.steering import Steerings


class Circuits:
    """`graphs`, `steerings` and `ablations`, for any number of threads."""

    def __init__(self, settings: Settings, metrics: CircuitMetrics | None = None, load: Load = load_replacement):
        self._model, metrics = CircuitModel(settings, load), metrics or CircuitMetrics()
        self.graphs = Graphs(settings, self._model, metrics)
        self.steerings = Steerings(settings, self._model, metrics)
        self.ablations = Ablations(settings, self._model)
        self._model.drop_idle = self.steerings.forget_idle

    def open(self, key: RunKey) -> None:
        """Have a run's models ready. Raises what is wrong with it."""
        self._model.open(key)

    def close(self) -> None:
        """End all work; what runs ends at its next step."""
        self.graphs.close()
        self.steerings.close()
        self._model.close()
