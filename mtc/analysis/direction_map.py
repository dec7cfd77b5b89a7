"""A map of the dictionary: features as points in the unit square, those of like decoder directions near each other.

The layout is t-SNE (van der Maaten and Hinton 2008, with the Barnes-Hut approximation of van der Maaten 2014; that of
scikit-learn) of the cosine distances to each direction's nearest ones, from the first two principal axes on. Opposite
directions are far apart. Distances across the map, and which way is up, mean nothing.

Of more than LANDMARKS features as many, drawn by a fixed seed, are laid out so; each of the others is put at the mean
of its nearest landmarks, weighted by cosine. So the time is bounded, and no more than CHUNK cosines are held at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh

Array = NDArray[Any]
LANDMARKS = 16_384
"""Most features that t-SNE lays out."""
PERPLEXITY = 15
"""How many neighbours, about, a point is to be near to."""
FEWEST = 100
"""Features below which t-SNE has nothing to say: then the map is the plane of the first two principal axes."""
NEAREST = 5
"""Landmarks by which another feature is placed."""
CHUNK = 1 << 25
"""Cosines held at a time."""
SPREAD = 1e-4
"""Standard deviation of the first coordinate from which t-SNE starts, as is usual."""
THREADS = 2
"""That compute the layout. The sum of two threads' parts does not depend on which comes first; of more it would, and
the layout with it."""


@torch.no_grad()
def direction_map(rows: torch.Tensor, placed: Array) -> Array:
    """[features, 2] float32 in the unit square; NaN for those that are not placed.

    Args:
        rows: [features, d], decoder rows; their lengths do not count.
        placed: [features] bool, which of them have a place. Features that never fired should not: what their rows
            were left at says nothing.
    """
    found = np.full((len(rows), 2), np.nan, np.float32)
    indices = np.flatnonzero(placed)
    if len(indices):
        unit = torch.nn.functional.normalize(rows.detach().cpu().float()[torch.from_numpy(indices)], dim=1)
        found[indices] = _in_unit_square(_points(unit))
    return found


def _points(unit: torch.Tensor) -> Array:
    if len(unit) <= LANDMARKS:
        return _laid_out(unit)
    chosen = np.sort(np.random.default_rng(0).permutation(len(unit))[:LANDMARKS])
    others = np.setdiff1d(np.arange(len(unit)), chosen)
    points = np.empty((len(unit), 2))
    points[chosen] = _laid_out(unit[chosen])
    near, cosine = _nearest(unit[others], unit[chosen], NEAREST, themselves=False)
    # Of opposite directions nothing is nearer: they get hardly any weight.
    weight = np.maximum(cosine, 1e-6)
    points[others] = (points[chosen][near] * weight[:, :, None]).sum(1) / weight.sum(1, keepdims=True)
    return points


def _laid_out(unit: torch.Tensor) -> Array:
    start = _principal_plane(unit)
    count = len(unit)
    if count < FEWEST:
        return start
    # 1.6 s of processor time, which only an analysis should take.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    k = 3 * PERPLEXITY + 1  # as many as TSNE asks for
    near, cosine = _nearest(unit, unit, k, themselves=True)
    # Each point is the first of its row: TSNE drops it from there, and where it is not, the nearest one instead.
    near = np.concatenate([np.arange(count, dtype=near.dtype)[:, None], near], 1)
    distance = np.concatenate([np.zeros((count, 1), np.float32), np.maximum(1 - cosine, 0)], 1)
    ends = np.arange(0, near.size + 1, k + 1)
    graph = sparse.csr_matrix((distance.ravel(), near.ravel(), ends), (count, count))
    start = (start / max(float(start[:, 0].std()), 1e-12) * SPREAD).astype(np.float32)
    with threadpool_limits(THREADS, "openmp"):
        layout = TSNE(perplexity=PERPLEXITY, metric="precomputed", init=start).fit_transform(graph)
    points: Array = layout.astype(np.float64)
    return points


def _principal_plane(unit: torch.Tensor) -> Array:
    """[points, 2] float64, coordinates along the two axes of most variance; signs chosen so that they are the same each
    time."""
    centred = (unit - unit.mean(0)).numpy().astype(np.float64)
    width = centred.shape[1]
    _, axes = eigh(centred.T @ centred, subset_by_index=[max(0, width - 2), width - 1])
    axes = axes[:, ::-1] * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])[::-1]
    points = np.zeros((len(unit), 2))
    points[:, : axes.shape[1]] = centred @ axes
    return points


def _nearest(of: torch.Tensor, among: torch.Tensor, k: int, themselves: bool) -> tuple[Array, Array]:
    """Indices and cosines, both [rows, k], of each row's nearest ones, nearest first; `themselves` says that both are
    the same rows, of which none is its own neighbour."""
    step = max(1, CHUNK // len(among))
    near, cosines = np.empty((len(of), k), np.int32), np.empty((len(of), k), np.float32)
    for a in range(0, len(of), step):
        cosine = of[a : a + step] @ among.T
        if themselves:
            cosine[torch.arange(len(cosine)), torch.arange(a, a + len(cosine))] = -2
        best = cosine.topk(k, dim=1)
        near[a : a + step], cosines[a : a + step] = best.indices.numpy(), best.values.numpy()
    return near, cosines


def _in_unit_square(points: Array) -> Array:
    """The points, moved and scaled alike along both axes, so that they fill the square along the longer one."""
    low, high = points.min(0), points.max(0)
    extent = float((high - low).max())
    return np.clip((points - (low + high) / 2) / extent + 0.5, 0, 1) if extent > 0 else np.full_like(points, 0.5)
