"""The plan in bytes beside what processes of real jobs take: predicted over measured memory.

    python -m benchmarks.memory                  all cases, into docs/benchmarks/memory.json, and a table
    python -m benchmarks.memory --case tiny      one of them
    python -m benchmarks.memory --check          the table again, by today's formulas

Runs `jobs/train.py` on this machine's CPUs and looks twice a second at each process's own memory: its share of
pages (Pss of /proc/PID/smaps_rollup) without the object store's. Of a kind of process the fullest counts. Peaks that
last less than half a second may go unseen. Minutes; GPUs' memory is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
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
from mtc.language_model.architectures import ModelInfo

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "memory.json"
SECONDS = 0.5
KINDS = {
    "RayTrainWorker": "trainer",
    "CaptureActor": "model actor, training",
    "FeatureActor": "model actor, analysis",
    "WholeModelActor": "model actor, whole model",
}
"""What is in a process's title, and the name of its kind."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "a wide dictionary": (
        "smollm2-135m",
        {
            "transcoder": {"group_sizes": [8192, 16_384]},
            "data": {"num_tokens": 16_384, "replays": 2, "shuffle_buffer_tokens": 131_072},
            "optimizer": {"batch_tokens": 1024, "warmup_steps": 5},
            "analysis": {"num_tokens": 16_384},
        },
    ),
    "four layers": (
        "smollm2-135m",
        {
            "model": {"layers": [3, 6, 9, 12]},
            "transcoder": {"group_sizes": [512, 1024]},
            "data": {"num_tokens": 16_384, "replays": 1, "shuffle_buffer_tokens": 16_384},
            "optimizer": {"warmup_steps": 5},
            "analysis": {"num_tokens": 8192, "loss_tokens": 1024},
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


def predictions(case: str, info: ModelInfo, cpus: int) -> dict[str, float]:
    """Bytes of each kind of process of a case on a machine with so many CPUs and memory enough."""
    config = load_preset(*CASES[case])
    plan = make_plan(config, [Node(cpus, 0)], info.d_model)
    memory = check_memory(config, plan, info, disk=math.inf)
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
        command, said = [sys.executable, "jobs/train.py", "--config", str(file)], Path(root) / "said"
        with said.open("w") as out:
            job = subprocess.Popen(command, stdout=out, stderr=out)
        peaks, titles, node = dict[int, int](), dict[int, str](), 0
        while job.poll() is None:
            found = dict(_own_memory(psutil.Process(job.pid), titles))
            peaks |= {pid: max(size, peaks.get(pid, 0)) for pid, size in found.items()}
            node = max(node, sum(found.values()))
            time.sleep(SECONDS)
        if job.returncode:
            raise RuntimeError(f"the job failed: {said.read_text()[-2000:]}")
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
    except psutil.Error:  # the job has ended
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
    lines = [
        "| job | process | predicted, GB | measured, GB | predicted / measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in ratios:
        sizes = f"{each.predicted / 1e9:.2f} | {each.measured / 1e9:.2f}"
        lines.append(f"| {each.case} | {each.kind} | {sizes} | {each.ratio:.2f} |")
    return "\n".join(lines)


def ratios(file: Path = RESULTS) -> list[Ratio]:
    """Today's formulas beside what was measured last."""
    found = []
    for case, record in json.loads(file.read_text())["cases"].items():
        predicted = predictions(case, ModelInfo(**record["model"]), record["cpus"])
        found += [Ratio(case, kind, predicted[kind], size) for kind, size in record["bytes"].items()]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--file", type=Path, default=RESULTS, help="written after each case (%(default)s)")
    parser.add_argument("--check", action="store_true", help="measure nothing: the formulas beside the file")
    options = parser.parse_args(argv)
    for case in () if options.check else options.case:
        config = load_preset(*CASES[case])
        from mtc.language_model import check_model  # torch and transformers, 4 s, which the table does without

        info = check_model(config.model, config.data.context_length)
        sizes = {"model": info._asdict(), "cpus": os.cpu_count(), "bytes": dict(sorted(measure(config).items()))}
        cases = json.loads(options.file.read_text())["cases"] if options.file.exists() else {}
        options.file.write_text(json.dumps({"cases": cases | {case: sizes}}, indent=1) + "\n")
    print(table(ratios(options.file)))


if __name__ == "__main__":
    main()
