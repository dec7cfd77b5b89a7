"""How faithful the map of decoder directions is, and what it takes: `python -m benchmarks.direction_map`.

Of a run (`--run runs/ID`, of one layer), or of random directions in clusters of clusters. For some of the features,
which of the ten directions with the largest cosines are among the ten, and the fifty, nearest points: of the map, and
of the plane of the first two principal axes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import torch
from scipy.spatial import cKDTree

from mtc.analysis.direction_map import Array, direction_map
from mtc.storage import open_run
from mtc.transcoder import load_transcoder

CLUSTER = 8
"""Directions about a centre, and centres about a centre of these."""
ASKED = 3000
"""Features whose neighbours are looked at, at most."""


def planted(features: int, width: int, seed: int = 0) -> torch.Tensor:
    """[features, width] rows about centres, in no order."""
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(-(-features // CLUSTER**2), width, generator=generator)
    inner = outer.repeat_interleave(CLUSTER, 0) + 0.8 * torch.randn(CLUSTER * len(outer), width, generator=generator)
    rows = inner.repeat_interleave(CLUSTER, 0)[:features]
    rows += 1.2 * torch.randn(features, width, generator=generator)
    return rows[torch.randperm(features, generator=generator)]


def principal_plane(unit: torch.Tensor) -> Array:
    """[features, 2], coordinates along the axes of most variance."""
    centred = unit - unit.mean(0)
    points: Array = (centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:]).numpy()
    return points


def kept(unit: torch.Tensor, points: Array, seed: int = 1) -> dict[str, float]:
    """Shares of the ten nearest directions that are among the nearest points."""
    asked = np.random.default_rng(seed).permutation(len(unit))[:ASKED]
    found: dict[int, list[float]] = {10: [], 50: []}
    tree = cKDTree(points)
    for part in np.array_split(asked, -(-len(asked) // 256)):
        cosine = unit[part] @ unit.T
        cosine[torch.arange(len(part)), torch.from_numpy(part)] = -2
        true = cosine.topk(10, dim=1).indices.numpy()
        near = tree.query(points[part], 51)[1]
        for i, own in enumerate(part):
            others = near[i][near[i] != own]
            for k, shares in found.items():
                shares.append(len(set(true[i]) & set(others[:k])) / 10)
    return {f"of_{k}": round(float(np.mean(shares)), 3) for k, shares in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a finished run; by default random directions")
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--width", type=int, default=2304)
    options = parser.parse_args()
    if options.run:
        rows = load_transcoder(open_run(options.run)).W_dec.detach()
    else:
        rows = planted(options.features, options.width)
    placed = np.ones(len(rows), bool)
    direction_map(rows[:200], placed[:200])  # loads what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun, processor = time.perf_counter(), time.process_time()
    points = direction_map(rows, placed)
    figures: dict[str, object] = {"features": len(rows), "width": rows.shape[1]}
    figures["seconds"] = round(time.perf_counter() - begun, 1)
    figures["processor_seconds"] = round(time.process_time() - processor, 1)
    figures["memory_mb"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
    unit = torch.nn.functional.normalize(rows, dim=1)
    figures |= {"map": kept(unit, points), "principal_plane": kept(unit, principal_plane(unit))}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
