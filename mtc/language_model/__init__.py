"""The language model that is opened up: found, checked, loaded up to a layer, run on packed windows.

Each name is loaded when it is first used: `LanguageModel` brings transformers' models, 4 s of CPU, which a process that
trains, tokenises or only passes a function on to others need not spend. Such modules say `language_model.LanguageModel`
where they make one.
"""

from typing import TYPE_CHECKING

from mtc.lazy import lazily

if TYPE_CHECKING:
    from mtc.language_model.architectures import MODULES, ModelError, ModelInfo
    from mtc.language_model.capture import Capture, Pending
    from mtc.language_model.model import LanguageModel
    from mtc.language_model.neurons import Neurons, read_neurons
    from mtc.language_model.packing import PackedWindows, pack_windows
    from mtc.language_model.sites import SitePair
    from mtc.language_model.weights import check_model, describe_model, load_tokenizer, prepare_model

__all__ = [
    "MODULES", "Capture", "LanguageModel", "ModelError", "ModelInfo", "Neurons", "PackedWindows", "Pending", "SitePair",
    "check_model", "describe_model", "load_tokenizer", "pack_windows", "prepare_model", "read_neurons",
]  # fmt: skip

_MODULES = {
    "architectures": ("MODULES", "ModelError", "ModelInfo"),
    "capture": ("Capture", "Pending"),
    "model": ("LanguageModel",),
    "neurons": ("Neurons", "read_neurons"),
    "packing": ("PackedWindows", "pack_windows"),
    "sites": ("SitePair",),
    "weights": ("check_model", "describe_model", "load_tokenizer", "prepare_model"),
}
__getattr__, __dir__ = lazily(__name__, {name: module for module, names in _MODULES.items() for name in names})
