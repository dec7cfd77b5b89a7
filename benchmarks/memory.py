"""The plan in bytes beside what processes of real jobs take: predicted over measured memory.

    python -m benchmarks.memory                  all cases, a table
    python -m benchmarks.memory --case tiny      one of them
    python -m benchmarks.memory --json --save    docs/benchmarks/memory.json

Runs `jobs/train.py` on this machine's CPUs and looks twice a second at each process's own memory: its share of pages
(Pss of /proc/PID/smaps_rollup) without the object store's. Of a kind of process the fullest counts. Peaks that last less
than half a second may go unseen. Minutes; GPUs' memory is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from cluster.memory import check_memory
from cluster.memory_analysis import analysis_driver, feature_actor, whole_actor
from cluster.memory_terms import RAY
from cluster.memory_training import model_actor, trainer
from cluster.resources import Node, make_plan
from mtc.config import RunConfig, load_preset
from mtc.language_model import check_model

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "memory.json"
SECONDS = 0.5
KINDS = {
    "RayTrainWorker": "trainer",
    "CaptureActor": "model actor, training",
    "FeatureActor": "model actor, analysis",
    "WholeModelActor": "model actor, whole model",
}
"""What is in a process's title, and the name of its kind."""
_SHORT = {"analysis": {"num_tokens": 16_384, "loss_tokens": 2048}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "a wide dictionary": (
        "smollm2-135m",
        {
            "transcoder": {"group_sizes": [4096, 8192]},
            "data": {"num_tokens": 16_384, "replays": 2, "shuffle_buffer_tokens": 131_072},
            "optimizer": {"batch_tokens": 1024, "warmup_steps": 5},
            **_SHORT,
        },
    ),
    "eight layers": (
        "smollm2-135m",
        {
            "model": {"layers": list(range(0, 16, 2))},
            "transcoder": {"group_sizes": [512, 1024]},
            "data": {"num_tokens": 16_384, "replays": 1, "shuffle_buffer_tokens": 16_384},
            "optimizer": {"warmup_steps": 5},
            **_SHORT,
        },
    ),
}
"""Preset and overrides by name."""


class Ratio(NamedTuple):
    """One kind of process of one case."""

    case: str
    """The job."""
    kind: str
    """The process, or `node` for all together."""
    predicted: float
    """Bytes by the plan."""
    measured: float
    """Bytes of the fullest such process."""

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def predictions(config: RunConfig) -> dict[str, float]:
    """Bytes of each kind of process on this machine."""
    info = check_model(config.model, config.data.context_length)
    plan = make_plan(config, [Node(float(os.cpu_count() or 1), 0)], info.d_model)
    memory = check_memory(config, plan, info)
    processes = {
        "trainer": trainer(config, info, 1, False, plan.trainer_threads),
        "model actor, training": model_actor(config, info, False),
        "model actor, analysis": feature_actor(config, info, False, memory.at_once),
        "model actor, whole model": whole_actor(config, info, False),
        "driver": analysis_driver(config, info),
    }
    node = max(sum(each.bytes for each in stage.main()) for stage in memory.stages)
    return {name: process.main_bytes for name, process in processes.items()} | {"Ray's own": RAY, "node": node}


def measure(config: RunConfig) -> dict[str, float]:
    """Peaks by kind of process of a job of this configuration, bytes; raises RuntimeError if the job fails."""
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "config.json"
        config = config.model_copy(update={"output": config.output.model_copy(update={"root": f"{root}/runs"})})
        file.write_text(config.model_dump_json(exclude_unset=True))
        job = subprocess.Popen(
            [sys.executable, "jobs/train.py", "--config", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        peaks, titles, node = dict[int, int](), dict[int, str](), 0
        while job.poll() is None:
            found = dict(_own_memory(psutil.Process(job.pid), titles))
            peaks |= {pid: max(size, peaks.get(pid, 0)) for pid, size in found.items()}
            node = max(node, sum(found.values()))
            time.sleep(SECONDS)
        if job.returncode:
            raise RuntimeError(f"the job failed: {(job.stderr.read() if job.stderr else b'').decode()[-2000:]}")
    by_kind: dict[str, list[int]] = defaultdict(list)
    for pid, size in peaks.items():
        kind = next((kind for part, kind in KINDS.items() if part in titles[pid]), "Ray's own")
        by_kind["driver" if pid == job.pid else kind].append(size)
    ray = float(sum(by_kind.pop("Ray's own")))
    return {kind: float(max(sizes)) for kind, sizes in by_kind.items()} | {"Ray's own": ray, "node": float(node)}


def _own_memory(job: psutil.Process, titles: dict[int, str]) -> list[tuple[int, int]]:
    """Process id and bytes of a job's processes; adds what they are called, which changes, to `titles`."""
    found = []
    try:
        processes = [job, *job.children(recursive=True)]
    except psutil.Error:
        return []
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            title = " ".join(process.cmdline())
        except (psutil.Error, OSError):  # it has ended
            continue
        sizes = {part[0]: int(part[1]) * 1024 for line in lines if len(part := line.split()) == 3}
        if title not in titles.get(process.pid, ""):
            titles[process.pid] = f"{titles.get(process.pid, '')} {title}"
        found.append((process.pid, sizes["Pss:"] - sizes["Pss_Shmem:"]))
    return found


def table(ratios: Sequence[Ratio]) -> str:
    """Markdown."""
    lines = ["| job | process | predicted, GB | measured, GB | predicted / measured |", "| --- | --- | --- | --- | --- |"]
    for each in ratios:
        sizes = f"{each.predicted / 1e9:.2f} | {each.measured / 1e9:.2f}"
        lines.append(f"| {each.case} | {each.kind} | {sizes} | {each.ratio:.2f} |")
    return "\n".join(lines)


def saved(file: Path = RESULTS) -> list[Ratio]:
    """What was measured last."""
    return [Ratio(**row) for row in json.loads(file.read_text())["ratios"]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--save", action="store_true", help=f"write it to {RESULTS.name} of docs/benchmarks")
    options = parser.parse_args(argv)
    ratios = []
    for case in options.case:
        config = load_preset(*CASES[case])
        predicted = predictions(config)
        ratios += [Ratio(case, kind, predicted[kind], size) for kind, size in sorted(measure(config).items())]
    found = {"ratios": [each._asdict() for each in ratios], "cores": os.cpu_count(), "command": "benchmarks.memory"}
    print(json.dumps(found, indent=1) if options.json else table(ratios))
    if options.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
