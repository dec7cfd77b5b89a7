"""What a plan's memory is counted in: processes, and the terms that each one's bytes are made of. Without torch.

A process's own memory is meant: pages that processes share are divided between them, and the object store is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mtc.config import RunConfig

FLOAT, BFLOAT16, FLOAT64 = 4, 2, 8
"""Bytes of a number."""
LIBRARIES = 450_000_000
"""Main memory of a trainer or model actor before it does anything: Python, torch, Ray, transformers. Measured."""
DRIVER = 600_000_000
"""Main memory of the driver before it does anything, and what it reads of the text and the report. Measured."""
RAY = 2_000_000_000
"""Main memory of Ray's own processes where a job runs alone: daemons and dashboard; while it trains, besides, the
controller, 0.3 GB, and some ten coordinators and helpers of 0.13 GB each. Measured."""
CUDA_MAIN, CUDA_CONTEXT = 1_500_000_000, 700_000_000
"""Main memory that a process needs besides where it uses a GPU, and what CUDA, cuBLAS and the kernels take of that GPU.
Not measured."""


MODEL = (("model.name", 1),)
"""The field that a language model's weights go by, of which there is one or none."""


class Term(NamedTuple):
    """Bytes with one cause."""

    what: str
    """What lies there, as a person would say it."""
    bytes: int
    """How many bytes it is when it is largest."""
    fields: tuple[tuple[str, int], ...] = ()
    """Fields of the configuration that the bytes are proportional to, each with what it is now."""


class Process(NamedTuple):
    """Memory of one process when it is fullest."""

    name: str
    """What it is, in the singular."""
    main: tuple[Term, ...]
    """What it takes of its node's main memory."""
    gpu: tuple[Term, ...] = ()
    """What it takes of its GPU's memory; nothing on a CPU."""

    @property
    def main_bytes(self) -> int:
        return total(self.main)

    @property
    def gpu_bytes(self) -> int:
        return total(self.gpu)

    def times(self, count: int, field: str, shares_gpu: bool) -> Process:
        """The process where there are `count` of it on a node, or also on its GPU, by the field that says so."""
        if count < 2:
            return self

        def by(terms: tuple[Term, ...]) -> tuple[Term, ...]:
            return tuple(term._replace(fields=(*term.fields, (field, count))) for term in terms)

        return self._replace(main=by(self.main), gpu=by(self.gpu) if shares_gpu else self.gpu)


def total(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)


def dictionary_fields(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """The fields that decide about the transcoders: how many there are, and the features of the largest."""
    members = config.members()
    features = ("transcoder.group_sizes", max(member.config.transcoder.num_features for member in members))
    return (
        ((("sweep" if config.sweep else "model.layers"), len(members)), features) if len(members) > 1 else (features,)
    )


def unit_fields(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """The fields that what is read of a work unit is proportional to."""
    return (("data.unit_tokens", config.data.unit_tokens), *layer_fields(config))


def layer_fields(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """That several layers are read, if so."""
    layers = len(config.model.sites)
    return (("model.layers", layers),) if layers > 1 else ()


def transcoder_words(config: RunConfig) -> str:
    """ "26 transcoders' ", or "the transcoder's "."""
    count = len(config.members())
    return f"{count} transcoders' " if count > 1 else "the transcoder's "


def model_item(config: RunConfig, on_gpu: bool) -> int:
    """Bytes of the language model's numbers; `model.dtype: auto` is bfloat16 on GPUs, on CPUs that multiply it fast
    (mtc.devices.choose_dtype). Which those are is not asked, so float32 is counted on all."""
    dtype = config.model.dtype
    return BFLOAT16 if dtype == "bfloat16" or (dtype == "auto" and on_gpu) else FLOAT


def unit_positions(config: RunConfig) -> int:
    """Most token positions of a work unit: a longer window is one of its own."""
    return max(config.data.unit_tokens, config.data.context_length)


def site_count(config: RunConfig) -> int:
    """Matrices [tokens, d_model] that a unit holds: a layer's source and target, each once for all that read it."""
    return len({key for part in config.model.sites for key in (part.source_key, part.target_key)})


def gb(count: float) -> str:
    """ "94.2 GB", three digits."""
    return f"{count / 1e9:.3g} GB"
