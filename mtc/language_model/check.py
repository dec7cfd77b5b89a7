"""What is wrong with a model's files, found without reading a weight: the size and header of each file, and names and
shapes of its tensors against config.json and the tokenizer. It takes seconds, whatever the size of the model.

transformers itself compares names and shapes: it is given tensors without data, so what it renames, ties or ignores
when it loads the real ones, it does here too.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mtc.config import ModelConfig
from mtc.errors import one_line
from mtc.language_model.architectures import MODULES, ModelError, modules_of
from mtc.storage import LFS_POINTER

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMED = 3
"""Most tensors that an error names."""
LOADING = threading.RLock()
"""One model at a time is made or loaded: transformers meanwhile changes torch's default dtype, its initialisers and the
logging of the whole process, and of two that overlap the last one to end would leave them changed."""


def refuse_pointer(path: str | os.PathLike[str]) -> None:
    """Raises ModelError for the few lines that git leaves in the place of a large file that it did not fetch."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it is cloned")


def read_model_config(config: ModelConfig, directory: str) -> PretrainedConfig:
    """config.json of a directory. Raises ModelError if it is missing, broken or that of quantised weights, ConfigError
    for an architecture that is not known."""
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path) and os.path.isfile(os.path.join(directory, "adapter_config.json")):
        raise ModelError(
            f"{config.name} is a PEFT adapter (adapter_config.json), which changes another model: merge the two "
            "(peft: merge_and_unload, then save_pretrained) and name the result"
        )
    if not os.path.isfile(path):
        raise ModelError(f"{config.name} holds no config.json; for a GGUF file set model.gguf_file")
    raw = _read_object(path)
    if not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path} does not say the architecture: model_type={raw.get('model_type')!r}")
    modules_of(config, raw["model_type"])  # first: transformers itself may not know it
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and (scheme := part.get("quantization_config")) is not None:
            named = scheme.get("quant_method") if isinstance(scheme, dict) else None
            raise ModelError(
                f"{path}: quantization_config ({named or 'no quant_method'}): quantised weights are not read; name the "
                "model that they were made from, or a GGUF file of it"
            )
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # of the class of each architecture, some of them from its arithmetic
        raise ModelError(f"{path} can't be used: {_short(error)}") from error


def check_weights(config: ModelConfig, directory: str, model_config: PretrainedConfig, complete: bool = True) -> None:
    """Compare the headers of a directory's weights with its config.json; nothing else of them is read.

    `complete=False` is for the hub's cache, where files may come later. Raises ModelError for files that are missing,
    cut short, damaged, pickled or quantised, and for tensors that are missing, have other shapes, or that the
    architecture has no place for.
    """
    shards = _shards(config, directory, complete)
    if not complete and not (shards and all(map(os.path.isfile, shards))):
        return
    if not shards:
        raise ModelError(f"{config.name} holds no weights: there is neither {WEIGHTS} nor {INDEX}")
    if missing := [os.path.basename(shard) for shard in shards if not os.path.isfile(shard)]:
        raise ModelError(
            f"{config.name}: {INDEX} names {len(shards)} files, of which {len(missing)} are missing: {_some(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= _read_header(shard)
    try:
        with quiet(report=False):
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]
            _, report = kind.from_pretrained(
                None,
                config=deepcopy(model_config),
                state_dict=tensors,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # the arithmetic of shapes of each architecture
        raise ModelError(f"{config.name}: its config.json describes no model: {_short(error)}") from error
    check_report(config, report, model_config)
    inside = re.compile(rf"(^|\.){re.escape(MODULES[model_config.model_type].layers)}\.\d+\.")
    # What is no matrix or vector, and the table of rotary frequencies, are constants of older files.
    unknown = [
        name
        for name in report["unexpected_keys"]
        if inside.search(name) and not name.endswith("inv_freq") and _dimensions(tensors, name) in (1, 2)
    ]
    if unknown:
        layers = model_config.get_text_config().num_hidden_layers
        raise ModelError(
            f"{config.name} has weights that its config.json (model_type={model_config.model_type}, "
            f"num_hidden_layers={layers}) has no place for: {_some(unknown)}"
        )


def check_report(config: ModelConfig, report: Mapping[str, Any], model_config: PretrainedConfig) -> None:
    """Raises ModelError for what transformers would make up when it loads weights, according to its report."""
    if wrong := sorted(report["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise ModelError(
            f"{config.name}: weights and config.json differ: {name} has the shape {list(found)}, by config.json it "
            f"would be {list(wanted)} (hidden_size={model_config.get_text_config().hidden_size}); so have {len(wrong)} "
            "tensors"
        )
    if missing := sorted(report["missing_keys"]):
        head = "; it is no causal language model" if all("lm_head" in name for name in missing) else ""
        saved = f" (config.json says {', '.join(map(str, model_config.architectures or ['nothing']))})" if head else ""
        raise ModelError(f"{config.name} has no weights for {_some(missing)}{head}{saved}")


def check_tokenizer_files(config: ModelConfig, directory: str) -> None:
    """Raises ModelError where a directory holds no tokenizer, of which transformers would make an empty one."""
    found = [name for name in TOKENIZERS if os.path.isfile(os.path.join(directory, name))]
    if not found:
        raise ModelError(f"{config.name} holds no tokenizer: there is no {TOKENIZERS[0]}")
    refuse_pointer(os.path.join(directory, found[0]))


def check_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raises ModelError for a tokenizer with ids beyond the `rows` of the embedding. Special tokens but BOS may have
    such ids, as a `[PAD]` that was added for batches has: no text becomes one."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = [id for id in tokenizer.get_vocab().values() if id >= rows]
    if wrong := sorted(id for id in beyond if id not in special or id == tokenizer.bos_token_id):
        raise ModelError(
            f"{config.name}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows (vocab_size): "
            f"{tokenizer.convert_ids_to_tokens(wrong[0])!r} (id {wrong[0]}) has none; save the model after "
            "resize_token_embeddings, or the tokenizer without what was added"
        )


def check_finite(config: ModelConfig, layers: torch.nn.Module) -> None:
    """Raises ModelError if a weight of a layer is NaN or infinite: then the activations of every token would be. Those
    of the embedding concern single tokens, which are dropped and counted."""
    for name, weight in layers.named_parameters():
        if not torch.stack(weight.aminmax()).isfinite().all():  # both are NaN if one weight is
            raise ModelError(f"{config.name}: layers.{name} has values that are not finite in {weight.dtype}")


@contextmanager
def quiet(report: bool = True) -> Iterator[None]:
    """Hide transformers' progress bars, and its report of what was loaded if that is not wanted either. One thread at a
    time."""
    with LOADING:
        verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        if not report:
            transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bar:
                transformers_logging.enable_progress_bar()


def _shards(config: ModelConfig, directory: str, complete: bool) -> list[str]:
    """The files of weights in the order in which transformers looks for them, those that are missing among them; none
    where they may come later."""
    if os.path.isfile(alone := os.path.join(directory, WEIGHTS)):
        return [alone]
    if os.path.isfile(index := os.path.join(directory, INDEX)):
        names = _read_object(index).get("weight_map")
        if not names or not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelError(f"{index} names no files: weight_map={names!r:.60}")
        return [os.path.join(directory, name) for name in sorted(set(names.values()))]
    if complete and (pickled := sorted(path.name for path in Path(directory).glob("pytorch_model*.bin"))):
        raise ModelError(
            f"{config.name} has its weights in {_some(pickled)}, a pickle, which is not read: load it with "
            "AutoModelForCausalLM.from_pretrained where it may be trusted, and save_pretrained writes safetensors"
        )
    return []


def _read_header(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without their data."""
    refuse_pointer(path)
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            names: list[str] = file.keys()
            for name in names:
                part = file.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                if dtype not in DTYPES and len(shape) > 1 and name.endswith("weight"):
                    raise ModelError(
                        f"{path}: {name} has the dtype {dtype}: quantised weights are not read; known: "
                        f"{', '.join(DTYPES)}"
                    )
                tensors[name] = torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
    except SafetensorError as error:
        raise ModelError(
            f"{path} is cut short or damaged, {os.path.getsize(path):,} bytes{_wanted(path)}: {_short(error)}"
        ) from error
    return tensors


def _wanted(path: str) -> str:
    """How long a safetensors file is by its header, if that can be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f" of {8 + length + max(ends):,}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""  # the header itself is what is damaged


def _read_object(path: str) -> dict[str, Any]:
    refuse_pointer(path)
    try:
        raw = json.loads(Path(path).read_bytes())
    except ValueError as error:  # also for bytes that are no text
        raise ModelError(f"{path} is no JSON: {_short(error)}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is no JSON object but {type(raw).__name__}")
    return raw


def _dimensions(tensors: Mapping[str, Tensor], renamed: str) -> int | None:
    """Dimensions of a tensor by the name in transformers' report, which may have lost or got a prefix."""
    return next((t.ndim for name, t in tensors.items() if name.endswith(renamed) or renamed.endswith(name)), None)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _short(error: BaseException) -> str:
    return one_line(error).removeprefix("SafetensorError: ")
