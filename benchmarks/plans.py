"""What the plan of a run on some machines takes in memory, and whether it is refused: nothing is run, none is needed.

    python -m benchmarks.plans

The language model is gemma-2-2b; each run is the reference preset with other layers and dictionaries. Of main memory
Ray counts seven tenths for processes and gives its object store the rest. Needs neither torch nor Ray.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from benchmarks.sizing import SHAPES, markdown
from cluster.memory import check_memory, memory_plan
from cluster.memory_terms import gb
from cluster.resources import Node, make_plan
from mtc.config import ConfigError, load_preset
from mtc.language_model.architectures import ModelInfo

GIB = 2**30
FOR_PROCESSES = 0.7
"""Share of free main memory that Ray counts for processes where it is started without more."""


class Machine(NamedTuple):
    """One node."""

    cpus: int
    """CPU cores."""
    gpus: int
    """GPUs."""
    gpu_gigabytes: int
    """Memory of a GPU, 10^9 bytes."""
    gibibytes: int
    """Main memory, 2^30 bytes."""

    def node(self) -> Node:
        """As Ray would describe it when nothing else runs there."""
        main = self.gibibytes * GIB
        store = main * (1 - FOR_PROCESSES)
        return Node(
            self.cpus, self.gpus, memory=main * FOR_PROCESSES, gpu_memory=self.gpu_gigabytes * 1e9, object_store=store
        )


MACHINES = {
    "8 GPUs of 80 GB, 1,024 GiB": Machine(128, 8, 80, 1024),
    "4 GPUs of 80 GB, 96 GiB": Machine(32, 4, 80, 96),
    "4 GPUs of 24 GB, 96 GiB": Machine(32, 4, 24, 96),
    "laptop, 1 GPU of 12 GB, 32 GiB": Machine(8, 1, 12, 32),
    "16 cores, no GPU, 64 GiB": Machine(16, 0, 0, 64),
}
RUNS: dict[str, dict[str, Any]] = {
    "1 x 4,608 (the preset)": {},
    "26 x 4,608": {"model": {"layers": "all"}},
    "26 x 65,536": {"model": {"layers": "all"}, "transcoder": {"group_sizes": [16_384, 49_152]}},
    "1 x 262,144": {"transcoder": {"group_sizes": [65_536, 196_608]}},
}
"""Layers x features, and what the preset is given for them."""


def gemma() -> ModelInfo:
    """gemma-2-2b."""
    shape = SHAPES["google/gemma-2-2b"]
    heads, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    return ModelInfo(
        "gemma2", shape.layers, shape.d_model, 8192, 256_000, shape.mlp_width, shape.heads, heads, keys, True
    )


def table() -> str:
    """Every run on every machine, as Markdown."""
    rows = [["machine", "layers x features", "a trainer", "fullest GPU", "node's main memory", "the plan"]]
    info = gemma()
    for machine, shape in MACHINES.items():
        for run, overrides in RUNS.items():
            config = load_preset("gemma-2-2b-layer17", overrides).of_layers(info.num_layers)
            plan = make_plan(config, [shape.node()], info.d_model)
            memory = memory_plan(config, plan, info)
            (trainer, *_), main = memory.stages[0].places, max(map(_main, memory.stages))
            gpu = max((_bytes(terms) for stage in memory.stages for terms in stage.gpus()), default=0)
            each = f"GPU {gb(trainer.process.gpu_bytes)}, main {gb(trainer.process.main_bytes)}"
            try:
                check_memory(config, plan, info, disk=math.inf)
                verdict = "fits"
            except ConfigError as error:
                verdict = f"refused: {str(error).rsplit('; ', 1)[1]}"
            of = [f"{gb(gpu)} of {gb(memory.gpu)}" if gpu else "-", f"{gb(main)} of {gb(memory.main)}"]
            rows.append([machine, run, each if gpu else f"main {gb(trainer.process.main_bytes)}", *of, verdict])
            machine = ""
    return markdown(rows)


def _main(stage: Any) -> int:
    return _bytes(stage.main())


def _bytes(terms: Any) -> int:
    return sum(term.bytes for term in terms)


if __name__ == "__main__":
    print(table())
