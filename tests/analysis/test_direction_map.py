"""The map of decoder directions, against planted clusters and the plane of principal axes."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from mtc.analysis import direction_map as module
from mtc.analysis.direction_map import direction_map

CLUSTERS, OF_EACH, WIDTH = 30, 12, 48


def planted(scale: float = 1.0) -> torch.Tensor:
    """[features, d], clusters of directions about random centres, in any order, of any length."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
    rows = centres[torch.arange(CLUSTERS * OF_EACH) % CLUSTERS]
    rows = rows + 0.6 * torch.randn(rows.shape, generator=generator)
    return scale * rows * (0.1 + torch.rand(len(rows), 1, generator=generator))


def kept(points: np.ndarray, k: int = OF_EACH - 1) -> float:
    """Share of each point's k nearest ones that are of its own cluster."""
    distance = ((points[:, None] - points[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    near = distance.argsort(1)[:, :k]
    return float((near % CLUSTERS == np.arange(len(points))[:, None] % CLUSTERS).mean())


def principal_plane(rows: torch.Tensor) -> np.ndarray:
    unit = (rows / rows.norm(dim=1, keepdim=True)).double().numpy()
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    return u[:, :2] * s[:2]


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return direction_map(planted(), np.ones(CLUSTERS * OF_EACH, bool))


def test_clusters_stay_together(points: np.ndarray) -> None:
    assert kept(points) > 0.95
    assert kept(principal_plane(planted())) < 0.6  # so two dimensions are not enough by themselves
    assert points.dtype == np.float32
    assert (points >= 0).all() and (points <= 1).all()
    assert np.ptp(points, axis=0).max() == pytest.approx(1)


def test_the_same_each_time_and_of_any_length_of_rows(points: np.ndarray) -> None:
    rows = planted()
    np.testing.assert_array_equal(direction_map(rows, np.ones(len(rows), bool)), points)
    lengths = torch.tensor([1.0, 4.0, 0.25]).repeat(len(rows) // 3)[:, None]  # powers of 2 round nothing
    np.testing.assert_array_equal(direction_map(rows * lengths, np.ones(len(rows), bool)), points)


def test_who_never_fired_has_no_place_and_moves_nobody(points: np.ndarray) -> None:
    silent = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    rows, placed = torch.cat([silent, planted()]), np.arange(50 + len(points)) >= 50
    found = direction_map(rows, placed)
    assert np.isnan(found[:50]).all()
    np.testing.assert_array_equal(found[50:], points)
    assert np.isnan(direction_map(rows, np.zeros(len(rows), bool))).all()


def test_more_than_the_landmarks_are_placed_among_them(points: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANDMARKS", 240)
    monkeypatch.setattr(module, "CHUNK", 1000)  # a few rows of cosines at a time
    found = direction_map(planted(), np.ones(len(points), bool))
    assert kept(found, k=5) > 0.9
    assert (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize("count", [1, 2, 30])
def test_few_are_seen_from_where_they_spread_most(count: int) -> None:
    rows = planted()[:count]
    found = direction_map(rows, np.ones(count, bool)).astype(np.float64)
    plane = principal_plane(rows)[:, :2]
    between = [np.linalg.norm(each[:, None] - each[None], axis=2) for each in (found, plane)]
    scale = between[1].max() / between[0].max() if count > 1 else 1
    np.testing.assert_allclose(between[0] * scale, between[1], atol=1e-5)
    assert count > 1 or found.tolist() == [[0.5, 0.5]]


def test_opposite_directions_are_far_apart() -> None:
    rows = planted()
    found = direction_map(torch.cat([rows, -rows]), np.ones(2 * len(rows), bool)).astype(np.float64)
    half = len(rows)
    to_opposite = np.linalg.norm(found[:half] - found[half:], axis=1)
    to_cluster = [np.linalg.norm(found[i] - found[(i + CLUSTERS) % half]) for i in range(half)]
    assert np.median(to_opposite) > 5 * np.median(to_cluster)


def test_twins_stand_beside_each_other():
    """Pairs of directions that are each other's nearest, and no nearer to others than chance has it."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(300, 64, generator=generator)
    rows = torch.cat([rows, rows + 0.5 * torch.randn(300, 64, generator=generator)])
    points = direction_map(rows, np.ones(600, bool))
    _, near = cKDTree(points).query(points, 2)
    assert (near[:, 1] == (np.arange(600) + 300) % 600).mean() > 0.95
