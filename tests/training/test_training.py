import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import run_ranks

from mtc.config import ConfigError, load_preset
from mtc.language_model import Neurons
from mtc.training import Calibrator, Health, ShuffleBuffer, StepMetrics, Trainer, Unit
from mtc.training import trainer as training
from mtc.transcoder import Compute, MatryoshkaTranscoder, TranscoderShape, native

D = 12


def small_config(backend="sparse", transcoder=None, **optimizer):
    return load_preset(
        "tiny",
        {
            "transcoder": {"dead_after_tokens": 128, "aux_k": 6, "k": 4, **(transcoder or {})},
            # Adam divides a gradient that is zero but for rounding by itself: a larger epsilon keeps that out.
            "optimizer": {"batch_tokens": 64, "precision": "float32", "backend": backend, "eps": 1e-4, **optimizer},
            "data": {"num_tokens": 64 * 50},
        },
    )


def batches(steps, tokens=64):
    """A planted dictionary that only a sparse code can express."""
    generator = torch.Generator().manual_seed(5)
    read, write = torch.randn(40, D, generator=generator), torch.randn(40, D, generator=generator)
    for _ in range(steps):
        z = torch.rand(tokens, 40, generator=generator) * (torch.rand(tokens, 40, generator=generator) < 0.08)
        yield z @ read + 0.5, z @ write - 0.3


def train_rank(steps, rank, world, backend="sparse", transcoder=None):
    trainer = Trainer(small_config(backend, transcoder), D, D)
    metrics = []
    for number, (x, y) in enumerate(batches(steps)):
        part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)  # 64 tokens do not divide by 3
        if number == 0:
            trainer.initialise(x[part], y[part])
        metrics.append(trainer.step(x[part], y[part], len(x)).metrics())
    if trainer.transcoder.activation.thresholds == "calibrated":
        calibrator = Calibrator(trainer.transcoder)
        for x, _ in batches(4):
            calibrator.add(x[rank * len(x) // world : (rank + 1) * len(x) // world])
        calibrator.finish()
    return metrics, trainer


def trained_rank(backend, transcoder, rank, world):
    metrics, trainer = train_rank(50, rank, world, backend, transcoder)
    return [m._asdict() for m in metrics], {n: v.numpy() for n, v in trainer.transcoder.state_dict().items()}


@pytest.mark.parametrize(("backend", "worlds", "transcoder"), [
    ("dense", (2,), {}),
    ("sparse", (3,), {"rank": "contribution"}),
    ("sparse", (2,), {"activation": "topk"}),
    ("sparse", (2,), {"activation": "jumprelu"}),
])  # fmt: skip
def test_training_on_several_ranks_equals_one(tmp_path, backend, worlds, transcoder):
    """50 steps through real gloo process groups, with AuxK active; k, and the penalty, are of the global batch."""
    metrics, trainer = train_rank(50, 0, 1, backend, transcoder)
    assert sum(m.dead > 0 for m in metrics) > 10, "AuxK must be active for this test to say anything"
    for world in worlds:
        results = run_ranks(trained_rank, world, tmp_path / str(world), backend, transcoder)
        for history, state in results:
            for one, many in zip(metrics, history, strict=True):
                assert one.loss == pytest.approx(many["loss"], rel=2e-4)
                assert one.l0 == many["l0"]
                assert one.dead == many["dead"]
                assert one.fvu == pytest.approx(many["fvu"], rel=2e-4)
                assert one.gradient_norm == pytest.approx(many["gradient_norm"], rel=2e-3)
            for name, value in trainer.transcoder.state_dict().items():
                torch.testing.assert_close(torch.tensor(state[name]), value, rtol=1e-3, atol=1e-4)


def chosen_among_ties(rank, world):
    """As on CPUs, which must equal as on GPUs: one at a time and as entries of a matrix."""
    from mtc import devices
    from mtc.transcoder.selection import keep_largest, largest_entries

    values = torch.randint(-3, 6, (400,), generator=torch.Generator().manual_seed(0)).float()
    values[50:60] = torch.nan
    part = values[rank * len(values) // world : (rank + 1) * len(values) // world]
    chosen = {}
    for count in (1, 40, 60, 100, 200, 390):
        chosen[count] = keep_largest(part, count)[0].tolist()
        with mock.patch.object(devices, "PRETENDING", True):
            assert keep_largest(part, count)[0].tolist() == chosen[count]
            entries, _ = largest_entries(part.unsqueeze(0), count)
        found = entries.feature[entries.value > 0]
        assert found.tolist() == torch.tensor(chosen[count]).nonzero().squeeze(1).tolist()
        assert torch.equal(entries.value[entries.value > 0], part[found])
    return chosen


def automatic_choice(rank, world):
    """On ranks of which only the first has fast bfloat16."""
    training.choose_bfloat16 = lambda precision, device: rank == 0
    trainer = Trainer(small_config("auto", precision="auto"), D, D)
    x, y = next(batches(1))
    trainer.initialise(x, y)
    trainer.step(x, y)
    return trainer.compute


def test_ties_across_ranks_go_to_the_earlier_rank(tmp_path):
    results = run_ranks(chosen_among_ties, 3, tmp_path / "ranks")
    for count, mask in chosen_among_ties(0, 1).items():
        assert [value for chosen in results for value in chosen[count]] == mask


def test_automatic_choices_are_the_same_on_all_ranks(tmp_path):
    first, second = run_ranks(automatic_choice, 2, tmp_path / "ranks")
    assert first == second
    assert not first.bfloat16


def test_prefix_weights_are_relative():
    (x, y), *_ = batches(1)
    losses, errors = [], []
    for weights in ([1.0, 1.0, 1.0], [2.0, 0.0, 6.0]):
        trainer = Trainer(small_config(transcoder={"prefix_weights": weights}), D, D)
        trainer.initialise(x, y)
        torch.nn.init.normal_(trainer.transcoder.W_dec, generator=torch.Generator().manual_seed(0))
        result = trainer.step(x, y)
        losses.append(result.metrics().loss)
        errors.append(result.totals.errors / (64 * D))
    assert losses[0] == pytest.approx(float(errors[0].mean()), rel=1e-5)
    assert losses[1] == pytest.approx(float(0.25 * errors[1][0] + 0.75 * errors[1][2]), rel=1e-5)


def test_backends_train_the_same_transcoder():
    (dense, _), (sparse, _) = train_rank(50, 0, 1, "dense"), train_rank(50, 0, 1, "sparse")
    assert dense[-1].fvu == pytest.approx(sparse[-1].fvu, rel=1e-3)
    assert [m.dead for m in dense] == [m.dead for m in sparse]


def test_auto_times_both_backends_and_keeps_its_choice_over_a_restart():
    config, (batch, *_) = small_config("auto"), batches(1)
    trainer = Trainer(config, D, D)
    trainer.initialise(*batch)
    before = {name: value.clone() for name, value in trainer.transcoder.state_dict().items()}
    trainer._choose_compute(*batch, trainer._objective(64))
    assert all(torch.equal(v, before[n]) or n == "threshold" for n, v in trainer.transcoder.state_dict().items())
    assert set(trainer.compute_timings) == {"dense", "sparse"}
    assert trainer.compute.backend == min(trainer.compute_timings, key=trainer.compute_timings.get)
    assert f"auto: dense {1000 * trainer.compute_timings['dense']:.1f} ms" in trainer.describe_compute()
    trainer.compute = Compute("dense", False)  # as if it had won
    trainer.step(*batch)
    resumed = Trainer(config, D, D)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.compute == Compute("dense", False)


def test_a_checkpoint_names_the_backend(monkeypatch):
    config = small_config("auto")
    trainer = Trainer(config, D, D)
    trainer.compute, trainer.compute_timings = Compute("sparse", True), {"dense": 0.5, "sparse": 0.25}
    state = trainer.state_dict()
    older = {name: value for name, value in state.items() if not name.startswith("compute")}
    older |= {"compute": torch.tensor([1, True]), "compute_seconds": torch.tensor([0.5, 0.25])}
    monkeypatch.setattr(training, "BACKENDS", ("another", "sparse", "dense"))
    for saved in (state, older):
        resumed = Trainer(config, D, D)
        resumed.load_state_dict(saved)
        assert resumed.compute == ("sparse", True)
        assert resumed.compute_timings == trainer.compute_timings
    monkeypatch.setattr(training, "BACKENDS", ("dense",))
    with pytest.raises(ConfigError, match=r"'sparse', which this version lacks .*the version that began it"):
        Trainer(config, D, D).load_state_dict(state)


def test_a_step_with_a_gradient_that_is_not_finite_changes_no_weight_and_is_counted():
    trainer = Trainer(small_config(), D, D)
    (x, y), (bad, _), (more, target) = batches(3)
    trainer.initialise(x, y)
    trainer.step(x, y)
    bad[3, 2] = math.nan
    before = trainer.state_dict()
    first, second = trainer.step(bad, y).metrics(), trainer.step(bad, y).metrics()
    assert (first.skipped, first.skipped_in_a_row) == (1, 1)
    assert (second.skipped, second.skipped_in_a_row) == (2, 2)
    assert not trainer.healthy()
    after = trainer.state_dict()
    for name in (n for n in before if n.startswith(("transcoder.W", "transcoder.b", "optimizer.exp"))):
        assert torch.equal(before[name], after[name]), name
    assert (after["transcoder.tokens_since_fired"] >= 2 * len(x)).all(), "a feature can't fire in a step that was none"
    good = trainer.step(more, target).metrics()
    assert (good.skipped, good.skipped_in_a_row) == (2, 0)
    assert trainer.healthy()
    again = Trainer(small_config(), D, D)
    again.load_state_dict(trainer.state_dict())
    assert again.skipped.tolist() == [2, 0]


def test_health_tells_spikes_collapse_and_skipped_steps_once():
    def row(step, loss=1.0, l0=8.0, skipped=0):
        return StepMetrics(step, step * 64, loss, (0.5,), l0, 0, (0,), 1e-3, 1.0, skipped, 0)

    def look(health, row):
        return health.look(row, row.loss, row.l0)

    health = Health(k=8)
    assert not [event for step in range(20) for event in look(health, row(step))]
    assert look(health, row(20, loss=2.9)) == []
    assert [kind for kind, _ in look(health, row(21, loss=3.5))] == ["loss_spike"]
    assert look(health, row(22, loss=5.0)) == []  # the same spike
    assert look(health, row(23)) == []
    assert [kind for kind, _ in look(health, row(24, loss=math.nan))] == ["loss_spike"]
    assert [kind for kind, _ in look(health, row(25, l0=3.9, skipped=2))] == ["steps_skipped", "l0_collapse"]
    assert look(health, row(26, l0=3.0, skipped=2)) == []
    assert "1 steps had no finite gradient" in look(health, row(27, skipped=3))[0][1]
    later = Health(k=8, skipped=3)  # after a restart
    assert not [event for step in range(7) for event in look(later, row(step, loss=math.nan, skipped=3))]
    assert not [event for step in range(7) for event in look(later, row(step, skipped=3))]
    assert [kind for kind, _ in look(later, row(8, loss=4.0, skipped=3))] == ["loss_spike"]

    between = Health(k=8)
    assert not [event for step in range(7) for event in look(between, row(step))]
    assert [kind for kind, _ in between.look(row(7), 4.0, 3.0)] == ["loss_spike", "l0_collapse"]  # not in a row


def test_memory_is_written_again_at_every_step():
    if native.load() is None:
        pytest.skip(native.status())
    trainer = Trainer(small_config(), D, D)
    pointers = []
    for x, y in batches(4):
        if not pointers:
            trainer.initialise(x, y)
        trainer.step(x, y)
        pointers.append([trainer.transcoder.W_enc.grad.data_ptr(), trainer.transcoder.W_dec.grad.data_ptr()])
    assert pointers[1] == pointers[2] == pointers[3]


def test_training_lowers_the_loss_of_every_prefix_and_is_bit_identical_for_a_seed():
    first, trainer = train_rank(30, 0, 1)
    second, again = train_rank(30, 0, 1)
    assert all(late < early for early, late in zip(first[0].fvu, first[-1].fvu, strict=True))
    assert first[-1].fvu[-1] < first[-1].fvu[0]
    assert [m.loss for m in first] == [m.loss for m in second]
    for a, b in zip(trainer.transcoder.parameters(), again.transcoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_training_equals_uninterrupted():
    config, data = small_config(), list(batches(20))
    whole = Trainer(config, D, D)
    whole.initialise(*data[0])
    for number, batch in enumerate(data):
        whole.step(*batch)
        if number == 11:
            state = {name: value.clone() for name, value in whole.state_dict().items()}
    resumed = Trainer(config, D, D)
    resumed.load_state_dict(state)
    assert (resumed.step_number, resumed.tokens) == (12, 12 * 64)
    for batch in data[12:]:
        resumed.step(*batch)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_fvu_and_dead_counter_are_what_the_batch_says():
    trainer = Trainer(small_config(), D, D)
    (x, y), *rest = batches(3)
    trainer.initialise(x, y)
    scale, b_dec = trainer.transcoder.target_scale, trainer.transcoder.b_dec.detach().clone()
    massive = y.clone()
    massive[7] *= 1000
    metrics = trainer.step(x, massive).metrics()
    scaled = torch.cat([y[:7], y[8:]]) * scale  # the decoder starts at zero, so every prefix predicts b_dec
    expected = (scaled - b_dec).square().sum() / (scaled - scaled.mean(0)).square().sum()
    assert metrics.fvu == pytest.approx([expected.item()] * 3, rel=1e-5)
    assert metrics.l0 == 4
    z = trainer.transcoder.pre_activations(rest[0][0])
    kept = z >= z.flatten().sort(descending=True).values[4 * 64 - 1]
    before = trainer.transcoder.tokens_since_fired.clone()
    trainer.step(*rest[0])
    after = trainer.transcoder.tokens_since_fired
    assert torch.equal(after, torch.where(kept.any(0), 0, before + 64))


def test_learning_rate_warms_up_holds_and_decays_linearly():
    trainer = Trainer(load_preset("gemma-2-2b-layer17"), 4, 4)
    total = trainer.config.total_steps
    assert trainer.learning_rate(0) == pytest.approx(3e-4 / 500)
    assert trainer.learning_rate(499) == pytest.approx(3e-4)
    start = total - total // 2
    assert all(trainer.learning_rate(s) == 3e-4 for s in range(500, start, 97))
    middle = start + (total - 1 - start) / 2
    assert trainer.learning_rate(int(middle)) == pytest.approx(3e-4 * (0.01 + 0.99 * 0.5), rel=1e-3)
    assert trainer.learning_rate(total - 1) == pytest.approx(3e-6)
    rates = [trainer.learning_rate(s) for s in range(500, total)]
    assert all(a >= b for a, b in pairwise(rates))


def test_gradients_are_clipped():
    trainer = Trainer(small_config(gradient_clip=1e-3), D, D)
    (x, y), *_ = batches(1)
    trainer.initialise(x, y)
    assert trainer.step(x, y).metrics().gradient_norm > 1e-3
    gradients = [p.grad for p in trainer.transcoder.parameters()]
    assert math.sqrt(sum(g.square().sum().item() for g in gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_features_start_at_the_neurons_whose_part_of_the_output_varies_most():
    """Neuron 2 varies most by what it adds, 0 by its activity, 1 is always equally active."""
    eye = torch.eye(D)
    out_norms = torch.tensor([1.0, 50.0, 9.0])
    constants, up_constants = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 1.0])
    directions = torch.stack([eye[0], 0 * eye[1], eye[2]])
    neurons = Neurons(directions, constants, torch.zeros(3, D), up_constants, out_norms, "relu", False)
    x, y = next(batches(1, 4096))
    trainer = Trainer(small_config("sparse", {"init": "mlp"}), D, D)
    with pytest.raises(ValueError, match=r"transcoder\.init='mlp' .*read_neurons"):
        trainer.initialise(x, y)
    trainer.initialise(x, y, neurons)
    torch.testing.assert_close(trainer.transcoder.W_enc[:2].detach(), torch.stack([eye[2], eye[0]]))


def test_calibration_gives_exactly_k_per_token():
    transcoder = MatryoshkaTranscoder(TranscoderShape(D, D, (16, 32), 4, "rms"), seed=3)
    calibrator = Calibrator(transcoder)
    seen = [x for x, _ in batches(10)]
    for x in seen:
        calibrator.add(x)
    calibrator.finish()
    assert (transcoder.encode(torch.cat(seen)) > 0).sum().item() == 4 * 640


@pytest.mark.parametrize("k", [4, 40])
def test_calibration_by_contribution_gives_a_threshold_to_each_feature(k, tmp_path):
    """Also where fewer than k per token are positive: 40 of 48 are asked."""
    transcoder = MatryoshkaTranscoder(TranscoderShape(D, D, (16, 32), k, "rms", rank="contribution"), seed=3)
    seen = torch.cat([x for x, _ in batches(10)])
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=torch.Generator().manual_seed(0)).mul_(torch.linspace(0, 3, 48).unsqueeze(1))
        transcoder.W_dec[1] *= 1e-20
        transcoder.b_enc[:2] = 100
    calibrator = Calibrator(transcoder)
    for rows in seen.split(64):
        calibrator.add(rows)
    border = calibrator.finish()
    (tmp_path / "t").write_bytes(transcoder.to_bytes())
    again = MatryoshkaTranscoder.load(str(tmp_path / "t"))
    assert again.threshold.isfinite().all()
    fires = again.encode(seen).detach() > 0
    z = transcoder.pre_activations(seen).detach()
    rank = z * transcoder.W_dec.detach().norm(dim=1)
    positive = int((rank > 0).sum())
    wanted = rank.flatten().sort(descending=True).values[: min(4 * 640 if k == 4 else positive, positive)]
    assert fires.sum().item() == len(wanted)
    assert not fires[:, 0].any() and (z[:, :2] > 90).all()
    assert border == (0 if k == 40 else pytest.approx(wanted[-1].item(), rel=1e-2))
    for search in (False, True):
        assert len(again.encode_sparse(seen, search).value) == len(wanted)
    trainer = Trainer(small_config(transcoder={"rank": "contribution"}), D, D)  # the last checkpoint of such a run
    trainer.transcoder.threshold = torch.ones(trainer.transcoder.num_features)
    state = trainer.state_dict()
    resumed = Trainer(small_config(transcoder={"rank": "contribution"}), D, D)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.transcoder.threshold, trainer.transcoder.threshold)


def make_unit(number, rows=20, without=()):
    """Rows that say what they are: unit * 1000 + row."""
    kept = np.setdiff1d(np.arange(rows, dtype=np.int32), np.array(without, np.int32))
    column = torch.from_numpy(number * 1000.0 + kept).unsqueeze(1)
    return Unit(number, {(0, "resid_mid"): column, (0, "mlp_out"): -column}, kept, rows, np.array(without, np.int32))


def drain(buffer, units, batch, stop_after=None):
    """Feed units whenever too little can be taken; returns the batches as lists of the rows' values."""
    units, taken = iter(units), []
    while stop_after is None or len(taken) < stop_after:
        while buffer.available < batch:
            unit = next(units, None)
            if unit is None:
                buffer.close()
                break
            buffer.add(unit)
        part = buffer.take(min(batch, buffer.available))
        if not len(part.rows):
            break
        source, target = part.activations.values()
        assert torch.equal(source, -target)
        assert (part.units * 1000 + part.rows).tolist() == source.flatten().int().tolist()
        taken.append(source.flatten().int().tolist())
    return taken


def test_shuffle_buffer_gives_each_row_once_with_its_target_and_its_name():
    taken = drain(ShuffleBuffer(100, [0]), [make_unit(n) for n in range(8)], 15)
    flat = [row for batch in taken for row in batch]
    assert Counter(flat) == Counter(unit * 1000 + row for unit in range(8) for row in range(20))
    assert len({row // 1000 for row in taken[0]}) > 1, "rows of one unit only"
    assert flat != sorted(flat)
    assert taken == drain(ShuffleBuffer(100, [0]), [make_unit(n) for n in range(8)], 15)
    assert taken != drain(ShuffleBuffer(100, [1]), [make_unit(n) for n in range(8)], 15)
    with pytest.raises(ValueError, match=r"3 rows .* has 0"):
        ShuffleBuffer(100, [0]).take(3)


def test_a_chunk_may_begin_with_a_unit_that_has_no_rows():
    """None of its activations is finite, or all of its rows were trained before."""
    empty, units = make_unit(0, without=range(20)), [make_unit(n) for n in range(1, 6)]
    taken = drain(ShuffleBuffer(60, [0]), [empty, *units[:3], empty._replace(number=9), *units[3:]], 15)
    assert Counter(row for batch in taken for row in batch) == Counter(
        n * 1000 + row for n in range(1, 6) for row in range(20)
    )


@pytest.mark.parametrize("steps", range(12))
def test_a_shuffle_buffer_goes_on_exactly_where_another_one_was(steps):
    """From the chunk's number, its units and the number of rows that left it; at any step, also between chunks."""
    units = [make_unit(n, rows=17 + n % 3, without=(n % 5,) if n % 4 == 0 else ()) for n in range(9)]
    whole = drain(ShuffleBuffer(80, [3, 0]), units, 14)
    first = ShuffleBuffer(80, [3, 0])
    before = drain(first, units, 14, stop_after=steps)
    index, inside, taken, size = first.position()
    gone = {row for batch in before for row in batch}
    for unit, rows in first.left().items():
        assert {unit * 1000 + row for row in rows} == {unit * 1000 + int(r) for r in units[unit].rows} - gone
    finished = {u.number for u in units if all(u.number * 1000 + int(row) in gone for row in u.rows)}
    again = ShuffleBuffer(80, [3, 0])
    again.restore(index, inside, taken, size)
    rest = [u for u in units if u.number in inside or u.number not in finished]
    assert before + drain(again, rest, 14) == whole


def test_a_shuffle_buffer_refuses_other_units_than_it_continues():
    for second in (make_unit(6, rows=10), make_unit(5, rows=11)):
        buffer = ShuffleBuffer(40, [0])
        buffer.restore(2, [4, 5], 7, 20)
        buffer.add(make_unit(4, rows=10))
        with pytest.raises(
            RuntimeError, match=rf"\[4, {second.number}\] of {9 + len(second.rows) + 1} .*\[4, 5\] of 20"
        ):
            buffer.add(second)


def test_processes_that_train_or_pass_classes_on_do_not_wait_for_transformers():
    code = (
        "import sys, cluster.train_worker, cluster.training, cluster.capture; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mtc_trains_without_ray():
    """In an interpreter where Ray cannot be imported, nor, until the rest of the package is, transformers."""
    code = """
import sys
sys.modules["ray"] = sys.modules["transformers"] = None
import torch
from mtc.config import ConfigError, load_preset
from mtc.training import Trainer
trainer = Trainer(load_preset("tiny"), 8, 8)
x, y = torch.randn(256, 8), torch.randn(256, 8)
trainer.initialise(x, y)
losses = [trainer.step(x, y).metrics().loss for _ in range(10)]
assert losses[-1] < losses[0], losses
del sys.modules["transformers"]
import mtc.analysis.recompute, mtc.language_model.model, mtc.storage, mtc.text, mtc.probing, mtc.report
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
