"""Activation functions, one file each, by the name that `transcoder.activation` gives them."""

from mtc.transcoder.activations.activation import Activated, Activation
from mtc.transcoder.activations.batch_topk import BatchTopK
from mtc.transcoder.activations.jumprelu import JumpReLU
from mtc.transcoder.activations.topk import TopK

ACTIVATIONS: dict[str, Activation] = {"batch_topk": BatchTopK(), "topk": TopK(), "jumprelu": JumpReLU()}

__all__ = ["ACTIVATIONS", "Activated", "Activation"]
