"""The stream from model actors to trainers on a real Ray: no copies, several layers, balance."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from wide_model import WIDTH, make_wide_model

from cluster import activations
from cluster.accounts import stream_timing
from cluster.activations import activation_dataset, map_on_model_actors
from cluster.batches import Batches
from cluster.blocks import ActorCosts, from_binary, iterate_units, to_binary
from cluster.capture import UnitCapture
from cluster.progress import RESUMED, ProgressReader, balance, progress_line, start_metrics_log
from cluster.resources import Node, Plan, make_plan
from cluster.tokenise import build_token_store
from mtc.config import RunConfig, load_preset
from mtc.language_model import LanguageModel, pack_windows
from mtc.report.markdown import render_blocks
from mtc.report.sections.configuration import timing_blocks
from mtc.results import NOT_MEASURED, PARTS, StreamTiming
from mtc.storage import Ledger, RunDirectory, merge_progress
from mtc.telemetry.logs import EVENTS
from mtc.text import TokenStore, work_units
from mtc.training import Clock, ShuffleBuffer, Unit


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_wide_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def config(wide_model: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_preset(
        "tiny",
        {
            "model": {"name": wide_model, "layers": [1, {"layer": 0, "source": "mlp_in"}]},
            "data": {"context_length": 64, "num_tokens": 20_000, "unit_tokens": 2048},
            "cluster": {"num_trainers": 2},
            "output": {"root": str(tmp_path_factory.mktemp("runs"))},
        },
    )


def test_activations_arrive_as_views_of_shared_memory(
    ray_cluster: Any, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = torch.randn(5, 8).to(torch.bfloat16)
    binary = to_binary(column)
    assert binary.buffers()[2].address == column.data_ptr()
    assert from_binary(pa.chunked_array([binary]), 8).data_ptr() == column.data_ptr()

    plan = make_plan(config, [Node(2, 0)], WIDTH)
    store = TokenStore.open(build_token_store(config))
    units = list(enumerate(work_units(store, config).training))[:6]
    # Units are captured in order, two in one task, and each comes as a block of its own.
    activations.configure_data_context()
    monkeypatch.setattr(activations, "TASKS_WANTED", 3)
    arrived = list(iterate_units(activation_dataset(config, plan, store.url, np.arange(6))))
    assert [unit.number for unit in arrived] == [number for number, _ in units]
    regions = plasma_regions()
    for unit in arrived:
        for column in unit.activations.values():
            start, end = column.data_ptr(), column.data_ptr() + column.numel() * 2
            assert any(a <= start and end <= b for a, b in regions), "a copy in this process's own memory"
    assert all(0 < unit.costs["forward"] < unit.costs["elapsed"] for unit in arrived)
    assert [unit.costs["positions"] for unit in arrived] == [store.positions(ids).sum() for _, ids in units]

    ids = units[3][1]
    ids = ids[np.argsort(-store.positions(ids), kind="stable")]
    windows = pack_windows(store.input_ids(ids), store.info.special_ids)
    pairs = LanguageModel(config.model).capture(windows)
    sites = [key for part in config.model.sites for key in (part.source_key, part.target_key)]
    assert list(arrived[3].activations) == sites
    for key, expected in zip(sites, [c for pair in pairs for c in pair], strict=True):
        got = arrived[3].activations[key]
        torch.testing.assert_close(got.float(), expected[windows.trainable].float(), rtol=1e-2, atol=1e-2)


def test_a_unit_that_is_started_before_another_is_sent_changes_nothing(ray_cluster: Any, config: RunConfig) -> None:
    """As on a GPU, where it is computed meanwhile."""
    store = TokenStore.open(build_token_store(config))
    rows = pa.table({"unit": [7, 8, 5]})
    actor = UnitCapture(config, store.url, "cpu", 2)
    at_once = list(actor(rows))
    actor.capture.ahead = 1
    ahead = list(actor(rows))
    assert [table["unit"][0].as_py() for table in ahead] == [7, 8, 5]
    for a, b in zip(at_once, ahead, strict=True):
        names = [name for name in a.column_names if name.startswith("activations_")]
        assert len(names) == 4 and a.select(names).equals(b.select(names))


def test_tokens_whose_activations_are_not_finite_are_left_out_and_named(
    ray_cluster: Any, config: RunConfig, wide_model: str, tmp_path: Path
) -> None:
    """The embedding of one token is not a number: neither is what follows it in a window, while other windows are
    untouched."""
    store = TokenStore.open(build_token_store(config))
    unit_ids = work_units(store, config).training[0]
    ids = unit_ids[np.argsort(-store.positions(unit_ids), kind="stable")]
    windows = store.input_ids(ids)
    found, counts = np.unique(np.concatenate(windows), return_counts=True)
    rare = int(found[counts.argmin()])
    shutil.copytree(wide_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    bad = config.model_copy(update={"model": config.model.model_copy(update={"name": str(tmp_path / "model")})})

    rows = pa.table({"unit": [0, -1]})
    (unit,) = iterate_units(Shard(UnitCapture(bad, store.url, "cpu", 2)(rows)))  # the empty unit only holds a place
    (whole,) = iterate_units(Shard(UnitCapture(config, store.url, "cpu", 2)(rows)))
    after, clean = [], []
    for window in windows:
        seen, text = np.cumsum(window == rare) > 0, ~np.isin(window, store.info.special_ids)
        after += seen[text].tolist()
        clean += [not seen.any()] * int(text.sum())
    assert set(np.flatnonzero(after)) <= set(unit.dropped.tolist())
    assert set(np.flatnonzero(clean)) <= set(unit.rows.tolist())
    assert 0 < len(unit.dropped) < unit.tokens == len(after)
    assert sorted([*unit.rows, *unit.dropped]) == list(range(unit.tokens))
    assert unit.activations.keys() == whole.activations.keys()
    for key, column in unit.activations.items():
        good = whole.activations[key]
        assert column.isfinite().all()
        torch.testing.assert_close(column[np.isin(unit.rows, np.flatnonzero(clean))], good[np.array(clean)])


class Shard:
    """As if the tables had come through Ray Data."""

    def __init__(self, tables: Iterator[pa.Table]):
        self.tables = tables

    def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
        return self.tables


def plasma_regions() -> list[tuple[int, int]]:
    """Addresses at which this process sees Ray's shared memory."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "plasma" in line:
            start, end = line.split()[0].split("-")
            regions.append((int(start, 16), int(end, 16)))
    return regions


class Sleeper:
    """A model actor whose pass takes a while and needs no core."""

    def __init__(self, device: str, threads: int):
        self.name = str(id(self)) + str(time.time_ns())

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(0.1)
        return pa.table({"actor": [self.name]})


def test_the_pool_grows_while_there_is_more_work_than_actors_take(ray_cluster: Any) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test
    plan = Plan("cpu", 1, 0.1, 0, 1, 1, 4, 0.1, 0, 1, (Node(2, 0),))
    rows = [pa.table({"unit": [i]}) for i in range(60)]
    seen = [row["actor"] for row in map_on_model_actors(rows, Sleeper, plan).iter_rows()]  # in order, whoever made them
    assert len(seen) == 60
    assert 1 < len(set(seen)) <= 4


def make_unit(number: int, rows: int = 100) -> Unit:
    activations = {(0, site): torch.full((rows, 4), float(number)) for site in ("resid_mid", "mlp_out")}
    costs = dict.fromkeys(ActorCosts.FIELDS, 2.0) | {"device_flops": 10.0, "flops": 5.0}
    return Unit(number, activations, np.arange(rows, dtype=np.int32), rows, costs=costs)


def test_ray_datas_loop_rests_between_two_looks() -> None:
    """Without it takes half a core where blocks wait for a trainer: 0.44 of one against 0.09, of 12 MB each, 2 a
    second, in a store of 200 MB."""
    activations.configure_data_context()
    assert activations.Paced in ray.data.DataContext.get_current().execution_callback_classes
    start = time.perf_counter()
    activations.Paced().on_execution_step(None)
    assert time.perf_counter() - start >= activations.LOOP_SECONDS


@pytest.mark.parametrize("units", [1, 3])
def test_the_account_of_a_short_stream(units: int) -> None:
    """The first unit is start-up; a run that needs no other knows nothing of the model actors."""
    ledger, clock = Ledger(), Clock()
    stream = (make_unit(number) for number in range(units))
    batches = Batches(stream, ShuffleBuffer(100, [0]), 50, ledger, clock, units)
    taken = 0
    while (share := batches.agree(last=False)) is not None:
        source, target = batches.take(share).values()
        assert torch.equal(source, target)
        taken += len(source)
    assert taken == 100 * units
    progress = merge_progress([ledger.table()])
    assert progress.finished().tolist() == list(range(units))
    assert not len(progress.wrong_units())
    timing = stream_timing(batches)
    assert timing.tokens == taken
    assert timing.actor_seconds == 2.0 * (units - 1)
    assert timing.mfu == (None if units == 1 else pytest.approx(5.0 / 2.0 / 10.0))
    assert (NOT_MEASURED in "\n".join(render_blocks(timing_blocks(timing), {}))) == (units == 1)
    assert ("model actors computed" in balance(timing)) == (units > 1)
    assert sum(timing.trainer_seconds.values()) == pytest.approx(timing.wall_seconds)


def make_timing(**changes: Any) -> StreamTiming:
    values: dict[str, Any] = {
        "tokens": 1000, "wall_seconds": 10.0, "startup_seconds": 1.0, "trainers": 1,
        "trainer_seconds": dict.fromkeys(PARTS, 1.0) | {"waiting": 5.0}, "actor_seconds": 20.0, "forward_seconds": 18.0,
        "sending_seconds": 1.0, "idle_seconds": 1.0, "captured_tokens": 1010, "forward_flops": 9e9,
        "device_flops": 1e9, "tokens_per_second": 100.0, "forward_mfu": 0.5, "mfu": 0.45,
    }  # fmt: skip
    return StreamTiming(**values | changes)


def test_balance_says_who_waits() -> None:
    line = balance(make_timing())
    assert "100 tok/s; trainers waited 50% of 10 s, model actors computed 90%; the language model is the limit" in line
    assert "replays" not in line, "trainers on the same CPUs have no time of their own"
    for replays, waiting, advice in (
        (1, 5.0, 2),
        (3, 5.0, 6),
        (2, 9.0, 8),
        (1, 10.0, None),
        (1, 4.9, None),
        (9, 5.0, None),
    ):
        own = dict.fromkeys(PARTS, 0.0) | {"waiting": waiting, "step": 10.0 - waiting}
        line = balance(make_timing(trainer_seconds=own), replays)
        wanted = "limit" if advice is None else f"limit; data.replays={advice} would take no longer"
        assert line.endswith(f"the language model is the {wanted}")
    trainers = dict.fromkeys(PARTS, 0.0) | {"all_reduce": 6.0, "step": 3.5, "waiting": 0.5}
    line = balance(make_timing(trainer_seconds=trainers, forward_seconds=8.0))
    assert line.endswith("the trainers are the limit (largest part of their time: all-reduce, 60%)")
    assert "both sides are busy" in balance(make_timing(trainer_seconds=trainers))
    assert "what lies between them is the limit" in balance(make_timing(forward_seconds=4.0))
    assert balance(make_timing(actor_seconds=0.0)).endswith("trainers waited 50% of 10 s")  # one unit was enough


def test_progress_line_of_one_and_of_several_layers() -> None:
    row = {"step": 5, "tokens": 500, "loss": 0.25, "fvu": [0.5, 0.4], "l0": 8.0, "dead": 1, "tokens_per_second": 100.0}
    row |= {"member": "layer3", "layer": 3, "seconds": dict.fromkeys(PARTS, 0.0) | {"waiting": 3.0, "step": 1.0}}
    assert progress_line([row], 10) == (
        "step      5/10  50%      100 tok/s  wait 75%  loss 0.2500  fvu 0.500 0.400  l0 8.0  dead 1  eta 0:05"
    )
    several = progress_line([row, row | {"member": "layer7", "layer": 7, "fvu": [0.9, 0.8], "dead": 0}], 10)
    assert "fvu 0.400 (layer3) 0.800 (layer7)  dead 1 0" in several
    sweep = [row | {"member": f"k{k}", "fvu": [0.9, 8 / k], "dead": 20 - k} for k in range(13, 20)]
    line = progress_line(sweep, 10)
    assert "fvu 0.421 (k19) to 0.615 (k13)  dead 1 to 7" in line and len(line) < 120


def test_the_history_goes_on_through_restarts_of_trainers_log_and_driver(
    ray_cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the actor keeps nothing that has arrived, for a run may last for weeks."""
    run = RunDirectory(str(tmp_path / "run"))
    log = start_metrics_log(run)
    monkeypatch.setattr(EVENTS, "handlers", [caplog.handler])
    monkeypatch.setattr(EVENTS, "level", logging.INFO)

    def append(*steps: int, loss: float = 1.0) -> None:
        for step in steps:
            parts = {"tokens_per_second": 9.0, "seconds": dict.fromkeys(PARTS, 1.0), "loss": loss}
            ray.get(
                log.append.remote(
                    {"member": "layer3", "layer": 3, "step": step, "tokens": step, "fvu": [1.0], "l0": 1.0, "dead": 0}
                    | parts
                )
            )

    def read() -> list[int]:
        with ProgressReader(log, {"layer3": run}, 100) as reader:
            pass  # it collects at the end too
        steps = [row["step"] for row in reader.rows("layer3")]
        assert [json.loads(line)["step"] for line in run.read("metrics.jsonl").decode().splitlines()] == steps
        return steps

    append(1, 10, 20, 30)
    assert read() == [1, 10, 20, 30]
    name, rows = ray.get(log.since.remote("", 0))
    assert ray.get(log.since.remote(name, len(rows)))[1] == []
    append(40)
    assert [row["step"] for row in ray.get(log.since.remote(name, 4))[1]] == [40]
    ray.get(log.event.remote(RESUMED, "on 1 trainer", 20))
    append(30, 40, loss=2.0)
    ray.kill(log, no_restart=False)
    while True:  # it answers for a moment yet
        try:
            if ray.get(log.since.remote("", 0))[0] != name:
                break
        except ray.exceptions.RayActorError:
            continue
    assert read() == [1, 10, 20, 30], "what the dead actor had is lost, what was written stays"
    ray.get(log.event.remote(RESUMED, "on 1 trainer", 10))
    append(20, loss=3.0)
    assert read() == [1, 10, 20]
    assert json.loads(run.read("metrics.jsonl").decode().splitlines()[-1])["loss"] == 3.0
    (event,) = [json.loads(line) for line in run.read("events.jsonl").decode().splitlines()]
    assert event["message"] == "on 1 trainer; 20 steps or a few more are done again"
    assert event["message"] in caplog.text


def test_a_part_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 10.0])
    monkeypatch.setattr("mtc.training.clock.time.perf_counter", lambda: next(now))
    clock = Clock()  # at 0
    with clock.part("step"), clock.part("checkpoint"):  # from 1, from 3
        pass  # until 7; the outer one until 8
    clock.move("step", "all_reduce", 1.0)
    clock.move("transport", "all_reduce", 5.0)  # not more than there is
    assert clock.read() == {
        "waiting": 0, "transport": 0, "step": 2, "all_reduce": 1, "checkpoint": 4, "other": 3,
    }  # fmt: skip
