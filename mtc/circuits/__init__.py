"""Circuits: what made a language model's next token, in features, and what happens if features are changed."""

from mtc.circuits.ablation import ablate
from mtc.circuits.attribution import attribute
from mtc.circuits.coarse import coarsen
from mtc.circuits.graph import FeatureTarget
from mtc.circuits.interventions import steer
from mtc.circuits.replacement import CircuitError, ReplacementModel
from mtc.results import Intervention

__all__ = [
    "CircuitError",
    "FeatureTarget",
    "Intervention",
    "ReplacementModel",
    "ablate",
    "attribute",
    "coarsen",
    "steer",
]
