"""The reconstruction benchmark: its scores against dense arithmetic in numpy, its sweep, its targets, its rows."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import ablations, activations, rows, targets
from benchmarks.activations import Part
from benchmarks.contenders import BATCH, DEFAULTS, PEERS_PYTHON, Ours, Task, our_config, row_order, train_ours
from benchmarks.quality import sweep
from benchmarks.rows import Rows, load_rows
from benchmarks.scores import Dictionary, linear_map, score

ENDS, K, D, FEATURES = (4, 12), 3, 6, 12
MASSIVE = 40
"""Every so many tokens one is massive."""


def part(tokens: int, generator: torch.Generator) -> Part:
    x = torch.randn(tokens, D, generator=generator)
    y = x @ torch.linspace(-1, 1, D * D).view(D, D) + torch.randn(tokens, D, generator=generator)
    y[::MASSIVE] = 100 * torch.ones(D) + 30 * y[::MASSIVE]
    return Part(x, y)


@pytest.fixture
def tiny() -> tuple[Rows, Dictionary]:
    g = torch.Generator().manual_seed(0)
    parts = [part(tokens, g) for tokens in (3000, 4000, 5000)]
    weights = (torch.randn(*size, generator=g) for size in ((FEATURES, D), (FEATURES,), (FEATURES, D), (D,)))
    scale = torch.rand(FEATURES, generator=g) + 0.5
    return Rows(*parts, 40.0, Path()), Dictionary(*weights, scale, torch.randn(D, D, generator=g))


@pytest.mark.parametrize("per_token", [False, True])
def test_scores_are_those_of_dense_arithmetic(tiny: tuple[Rows, Dictionary], per_token: bool) -> None:
    data, dictionary = tiny
    found = score(dictionary, ENDS, K, per_token, data, data.validation, data.test)

    W_enc, b_enc, W_dec, b_dec, scale, W_skip = (t.double().numpy() for t in dictionary)

    def encode(p: Part) -> np.ndarray:
        return np.maximum(p.source.double().numpy() @ W_enc.T + b_enc, 0)

    z = encode(data.test)
    if per_token:
        nth = np.sort(z * scale, axis=1)[:, -K][:, None]
        active = (z * scale >= nth) & (z > 0)
    else:
        chosen = np.arange(4000) % MASSIVE != 0
        ranks = np.sort((encode(data.validation) * scale)[chosen].ravel())[::-1]
        active = z * scale > ranks[K * chosen.sum()]
    y = data.test.target.double().numpy()
    base = data.test.source.double().numpy() @ W_skip.T + b_dec
    typical = np.arange(len(y)) % MASSIVE != 0
    for p, end in enumerate(ENDS):
        error = y - base - (z * active)[:, :end] @ W_dec[:end]
        for fvu, use in ((found.fvu, typical), (found.fvu_all, np.ones_like(typical))):
            assert fvu[p] == pytest.approx((error[use] ** 2).sum() / ((y[use] - y[use].mean(0)) ** 2).sum(), rel=1e-4)
    assert found.l0 == pytest.approx(active[typical].sum(1).mean(), abs=0.01)
    assert found.l0_all == pytest.approx(active.sum(1).mean(), abs=0.01)
    assert found.dead == (~active.any(0)).mean()


def test_linear_map_is_least_squares_with_and_without_massive_tokens(tiny: tuple[Rows, Dictionary]) -> None:
    data, _ = tiny
    found = linear_map(data)

    def fvu(fitted_without: bool, scored_without: bool) -> float:
        arrays = []
        for p, without in ((data.train, fitted_without), (data.test, scored_without)):
            use = np.arange(len(p.source)) % MASSIVE != 0 if without else slice(None)
            x = np.c_[p.source.double().numpy()[use], np.ones(len(p.source))[use]]
            arrays += [x, p.target.double().numpy()[use]]
        x, y, test_x, test_y = arrays
        error = test_y - test_x @ np.linalg.lstsq(x, y, rcond=None)[0]
        return float((error**2).sum() / ((test_y - test_y.mean(0)) ** 2).sum())

    assert found == pytest.approx((fvu(True, True), fvu(False, False), fvu(False, True)), rel=1e-5)


def test_rows_come_from_captured_files_and_are_scaled_by_tokens_that_are_not_massive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(rows, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(activations, "CHUNK_TOKENS", 2000)
    monkeypatch.setattr(activations, "HELDOUT_TOKENS", 2000)
    directory, g = tmp_path / "benchmarks" / "smollm2-layer9", torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    captured = {}
    for name in ("train-000", "train-001", "validation-000", "test-000"):
        made = part(2000, g)
        captured[name] = {"source": 7 * made.source.bfloat16(), "target": 3 * made.target.bfloat16()}
        save_file(captured[name], directory / f"{name}.safetensors")

    found = load_rows("smollm2", 9, 4000)  # nothing is captured: there is no chunk to capture, and no model here
    raw = torch.cat([captured[f"train-{n:03d}"]["target"] for n in (0, 1)]).float()
    typical = torch.arange(4000) % MASSIVE != 0
    assert found.typical(found.train).equal(typical)
    assert found.train.target[typical].square().sum(1).mean().item() == pytest.approx(D, rel=1e-5)
    assert torch.allclose(found.train.target / found.train.target[0, 0], raw / raw[0, 0], rtol=1e-4)
    assert found.massive_norm / found.train.target.norm(dim=1).median() == pytest.approx(5, rel=1e-5)
    assert torch.allclose(found.test.source.square().mean(1), torch.ones(2000), atol=1e-4)
    (directory / "train-001.safetensors").unlink()
    assert load_rows("smollm2", 9, 4000).train.target.equal(found.train.target)  # made once


OWN_FORWARD = """
import torch
from benchmarks.peers import Work, make
work = Work(16, 16, (8, 16), k=4, batch=64, steps=20, lr=1e-2, seed=0, dead_after_tokens=500, warmup_steps=5)
x, y = torch.randn(64, 16), torch.randn(64, 16)
for name in ("eai-sparsify, skip", "eai-sparsify, sign", "eai-sparsify, skip, sign"):
    peer = make(name, work, x, y)
    for _ in range(20):
        peer.step(x, y)
    e = peer.export()
    assert ("W_skip" in e) == ("skip" in name)
    z = torch.relu(x @ e["W_enc"].T + e["b_enc"])
    a = torch.zeros_like(z).scatter_(1, z.topk(4, dim=1).indices, 1.0) * z
    if "sign" in name:
        peer._optimizer.eval()
    own = peer._coder(x).sae_out
    skip = x @ e["W_skip"].T if "skip" in name else 0
    torch.testing.assert_close(a @ e["W_dec"] + e["b_dec"] + skip, own)
"""


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="sparsify has an environment of its own: make peers")
def test_exported_sparsify_is_what_the_library_computes() -> None:
    done = subprocess.run([PEERS_PYTHON, "-c", OWN_FORWARD], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("optimum", "asked"), [(6, {3, 6, 12}), (20, {3, 6, 12, 24, 48}), (0.1, {3, 6, 12, 1.5, 0.75})]
)
def test_sweep_goes_on_beyond_an_end_that_is_best(optimum: float, asked: set[float]) -> None:
    trained = []

    def fvu(rate: float) -> float:
        trained.append(rate)
        return abs(np.log(rate / optimum))

    assert set(sweep((3, 6, 12), 2, fvu)) == asked
    assert sorted(trained) == sorted(asked)  # each once
    assert set(sweep((3, 6, 12), 0, fvu)) == {3, 6, 12}


def test_rows_are_trained_as_often_as_they_are_replayed() -> None:
    replays, tokens = DEFAULTS["data"]["replays"], 20 * BATCH
    config = our_config(Task("smollm2", 20, train_tokens=tokens), 6e-3, 0, {"data": {"shuffle_buffer_tokens": 8192}})
    steps = list(row_order(config, tokens, 0))
    assert config.total_steps == len(steps) == 392  # 98 of every replay: the task asks for 390 in all
    once = torch.cat(steps[: replays * 20])
    assert len(once[:tokens].unique()) < tokens  # not one epoch after the other
    assert torch.bincount(once).eq(replays).all() and {len(rows) for rows in steps} == {BATCH}


def measured(fvu: list[float], **more: float) -> dict:
    return {"fvu": fvu, "l0": 32.0, "dead": 0.01, "seconds": 60.0, "cpu_seconds": 100.0, **more}


@pytest.mark.parametrize(
    "variant", [v for v in ablations.VARIANTS if "init" not in (v.transcoder or {})], ids=lambda v: v.name
)
def test_every_ablation_trains_the_defaults_but_for_what_it_names(variant: ablations.Variant) -> None:
    task = Task("smollm2", 20, 8 * BATCH, 8, (4, 4, 4), 3)
    settings = ablations.settings(variant, task)
    mine, plain = (our_config(task, 1e-3, 0, s) for s in (settings, ablations.settings(ablations.VARIANTS[0], task)))
    defaults = type(plain.transcoder)(group_sizes=(4, 4, 4), k=3)
    differs = {n for n, value in plain.transcoder if value != getattr(defaults, n)}
    assert differs == {"input_norm", "dead_after_tokens", "calibration_tokens"}, (
        "which the rows, and the preset, decide"
    )
    named = (
        set(variant.transcoder or {}) | set(variant.optimizer or {}) | ({"replays"} if variant.replays > 1 else set())
    )
    changed = {
        n for part in ("transcoder", "optimizer", "data") for n, value in getattr(mine, part)
        if value != getattr(getattr(plain, part), n)
    }  # fmt: skip
    assert changed <= named | {"warmup_steps"}
    g = torch.Generator().manual_seed(0)
    rows = Part(torch.randn(8 * BATCH, D, generator=g), torch.randn(8 * BATCH, D, generator=g))
    trained = train_ours(Rows(rows, rows, rows, 40.0, Path()), task, 1e-3, 0, Ours(settings), variant.trainer)
    assert trained.dictionary.W_dec.isfinite().all() and trained.dictionary.W_dec.any()


def test_targets_are_computed_from_the_means() -> None:
    means = {
        "mtc": measured([0.40, 0.30, 0.28], l0=33.0),
        "mtc, skip": measured([0, 0, 0.18]),
        "mtc, not nested": measured([0.8, 0.5, 0.25]),
        "sae-lens": measured([0.55, 0.41, 0.37]),
        "sae-lens, no massive rows": measured([0.50, 0.40, 0.35], cpu_seconds=200.0),
        "dictionary-learning": measured([0.45, 0.42, 0.40]),
        "eai-sparsify": measured([0, 0, 0.32]),
        "eai-sparsify, skip, sign": measured([0, 0, 0.24]),
    }
    task = {
        "task": {"train_tokens": 1000, "k": 32},
        "capture": {"tokens": 10, "seconds": 1.0, "cpu_seconds": 2.0},
        "results": [{"contender": name, "means": values} for name, values in means.items()],
        "shares": [
            {"share": 0.125, "means": measured([0, 0, 0.36])},
            {"share": 0.25, "means": measured([0, 0, 0.35], cpu_seconds=30.0)},
        ],
    }
    found = targets.figures(task)
    assert found == {
        "full_vs_nested": 0.28 / 0.35,
        "prefixes_vs_nested": [0.40 / 0.45, 0.30 / 0.40],
        "full_vs_flat": 0.28 / 0.32,
        "own_flat": 0.28 / 0.25,
        "tokens_to_match": 0.25,
        "seconds_to_match": (0.25 * 200 + 30) / (200 + 200),
        "seconds_to_match_wall": (0.25 * 100 + 60) / (100 + 60),
        "skip_vs_skip": 0.18 / 0.24,
        "dead": 0.01,
        "l0": 1 / 32,
    }
    worse = found | {"full_vs_nested": 0.9, "prefixes_vs_nested": [0.1, 0.9], "tokens_to_match": None}
    described = targets.describe({"smollm2": found, "gemma3": worse, "gemma3-layer0": worse | {"skip_vs_skip": 2.0}})
    assert described["full_vs_nested"]["worst"] == 0.9 and not described["full_vs_nested"]["met"]
    assert described["prefixes_vs_nested"]["worst"] == [0.40 / 0.45, 0.9] and not described["prefixes_vs_nested"]["met"]
    assert described["tokens_to_match"]["worst"] is None and not described["tokens_to_match"]["met"]
    assert targets.verdict(described["skip_vs_skip"]) == "met, not all tasks"
    assert described["skip_vs_skip"]["met"] and not described["skip_vs_skip"]["complete"]
    assert not described["own_flat"]["met"] and not described["l0"]["met"] and described["dead"]["met"]


def test_results_of_before_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "quality-smollm2.json"
    file.write_text(json.dumps({"tasks": {"smollm2": {"task": {}, "linear_map_fvu": 0.4, "results": []}}}))
    with pytest.raises(SystemExit, match=f"^{file} is of before .* anew: .*--task smollm2 --peers --save$"):
        targets.read(str(file))
