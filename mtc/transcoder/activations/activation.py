"""What an activation function must say of itself, in training by dense and by sparse products and at inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from mtc.transcoder.objective import Objective, Weights
from mtc.transcoder.pre_activations import PreActivations
from mtc.transcoder.products import Workspace
from mtc.transcoder.selection import Chosen


class Activated(NamedTuple):
    """Activations of a batch, differentiable."""

    value: Tensor
    """[tokens, features] or [entries], activations, at least 0."""
    penalty: Tensor | None = None
    """[tokens], what the activation adds to the loss for each; None for nothing."""


class Activation(ABC):
    """Which entries are active, the gradients that this gives, and where the threshold at inference comes from."""

    thresholds: ClassVar[Literal["calibrated", "trained", "none"]]
    """Where the thresholds at inference come from: one that is calibrated after training, one for each feature that is
    trained, or none, where features of one token compete."""

    @abstractmethod
    def dense(self, before: Tensor, weights: Weights, objective: Objective) -> Activated:
        """Activations [tokens, features] of pre-activations `before`, for autograd."""

    @abstractmethod
    def choose(self, before: PreActivations, objective: Objective, workspace: Workspace) -> Chosen:
        """Entries of this rank that have activations or gradients, with their exact pre-activations.

        On a GPU entries of value 0 may fill up the shape; they count for nothing.
        """

    def active(self, value: Tensor, feature: Tensor, weights: Weights) -> Tensor:
        """[entries] bool: which chosen entries are active, of pre-activations `value`."""
        return value > 0

    def sparse(
        self, value: Tensor, token: Tensor, feature: Tensor, tokens: int, weights: Weights, objective: Objective
    ) -> Activated:
        """Activations [entries] of the chosen entries' pre-activations `value`, for autograd."""
        return Activated(value)
