"""The language model that is opened up: found, checked, loaded up to a layer, run on packed windows."""

from mtc.language_model.architectures import MODULES, ModelError, ModelInfo
from mtc.language_model.capture import Capture, Pending
from mtc.language_model.model import LanguageModel, SitePair
from mtc.language_model.neurons import Neurons, read_neurons
from mtc.language_model.packing import PackedWindows, pack_windows
from mtc.language_model.weights import check_model, describe_model, load_tokenizer, prepare_model

__all__ = [
    "MODULES", "Capture", "LanguageModel", "ModelError", "ModelInfo", "Neurons", "PackedWindows", "Pending", "SitePair",
    "check_model", "describe_model", "load_tokenizer", "pack_windows", "prepare_model", "read_neurons",
]  # fmt: skip
