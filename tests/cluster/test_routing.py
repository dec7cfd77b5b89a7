"""Transcoders divided among trainers: the rows that reach each, and what it learns, as one process alone would."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import run_ranks

from cluster.batches import Batches
from cluster.blocks import ActorCosts
from cluster.data_state import data_state
from cluster.memory import check_memory
from cluster.memory_training import training_bytes
from cluster.placement import place, placed_members, split_of
from cluster.resources import Node, make_plan, trainer_rate
from cluster.resume import read_progress, unneeded_units
from cluster.routing import Routing, exchange
from cluster.stream import deal
from cluster.train_worker import _all_may_save, _calibrate, _initialise, _open_trainers, _step, files_of
from mtc.config import ConfigError, load_preset
from mtc.language_model.architectures import ModelInfo
from mtc.storage import Checkpoints, CheckpointWriter
from mtc.training import CALIBRATION_ROWS, Calibrator, Clock, SideBySide, Trainer, Unit
from mtc.transcoder import world_size

D, UNITS, CALIBRATION, TOKENS, BATCH = 8, 14, 3, 96, 64
SITES = [(0, "mlp_in"), (0, "mlp_out"), (1, "mlp_out"), (1, "resid_mid")]
SWEEP = [
    {}, {"transcoder.activation": "topk", "optimizer.backend": "dense"},
    {"transcoder.skip": True, "transcoder.input_norm": "scalar", "transcoder.k": 5},
]  # fmt: skip


def settings(**changes):
    return load_preset(
        "tiny",
        {
            "model": {"layers": [1, {"layer": 0, "source": "mlp_in"}]},
            "transcoder": {"group_sizes": [16, 32], "k": 3, "dead_after_tokens": 64},
            "optimizer": {"batch_tokens": BATCH, "backend": "sparse", "warmup_steps": 2, "eps": 1e-4},
            "data": {"num_tokens": UNITS * TOKENS, "shuffle_buffer_tokens": 300},
            "sweep": SWEEP,
        }
        | changes,
    )


# Rows ---------------------------------------------------------------------------------------------------------------


def rows_of(rank, count, dtype):
    generator = torch.Generator().manual_seed(rank)
    return {site: torch.randn(count, 3 + place, generator=generator).to(dtype) for place, site in enumerate(SITES)}


WANTED = [SITES[:1], SITES[1:], SITES[:], SITES[1:2]]


def exchanged(counts, dtype, rank, world):
    layout = {site: (dtype, 3 + place) for place, site in enumerate(SITES)}
    mine = rows_of(rank, counts[rank], dtype) if counts[rank] else {}
    found = exchange(mine, counts, WANTED[:world], layout, rank, torch.device("cpu"))
    return {site: part.clone() for site, part in found.items()}


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [((5,), torch.float32), ((5, 3), torch.bfloat16), ((0, 7, 2), torch.float32), ((4, 0, 0, 9), torch.bfloat16)],
)
def test_each_rank_gets_all_ranks_rows_of_its_sites_in_their_order(tmp_path, counts, dtype):
    found = run_ranks(exchanged, len(counts), tmp_path / "ranks", counts, dtype)
    every = [rows_of(rank, count, dtype) for rank, count in enumerate(counts)]
    for wanted, got in zip(WANTED, found, strict=False):
        assert list(got) == wanted
        for site in wanted:
            assert torch.equal(got[site], torch.cat([part[site] for part in every])), site
            assert got[site].dtype == dtype


# Training -----------------------------------------------------------------------------------------------------------


def unit(number):
    generator = torch.Generator().manual_seed(number)
    activations = {key: torch.randn(TOKENS, D, generator=generator).to(torch.bfloat16) for key in SITES}
    rows = torch.arange(TOKENS, dtype=torch.int32).numpy()
    return Unit(number, activations, rows, TOKENS, rows[:0], dict.fromkeys((*ActorCosts.FIELDS, "device_flops"), 1.0))


def train_rank(config, url, stop, rank, world):
    """What train_worker does, on units of this process: `stop` steps and a checkpoint, or to the end. Returns what was
    seen of the data, by kind, and the weights of this rank's transcoders."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(url)
    checkpoint = checkpoints.latest()
    routing = Routing(config, rank, world)
    with routing.alone():
        trainers = _open_trainers(routing.members, D, torch.device("cpu"), checkpoint)
        together = SideBySide(list(trainers.values()))
    lead = next(iter(trainers.values()))
    state = data_state(config, checkpoint, rank, world, "cpu")
    unneeded = unneeded_units(checkpoint, world) if checkpoint else set()
    left = np.array([number for number in range(UNITS + CALIBRATION) if number not in unneeded])
    mine = [number for number in deal(left, world)[rank::world].tolist() if number >= 0]
    if world == 3 and checkpoint is None:  # one that never gets a unit
        mine = [[*range(0, UNITS, 2), UNITS], [*range(1, UNITS, 2), UNITS + 1, UNITS + 2], []][rank]
    batches = Batches(map(unit, mine), state.buffer, BATCH, state.ledger, Clock(), UNITS, state.filters)
    take, peek, calibration = batches.take, batches.buffer.peek, batches.calibration
    seen = {"first": [], "steps": [], "fresh": []}

    def noted(kind, rows):
        seen[kind].append({site: part.clone() for site, part in rows.items()})
        return rows

    def fresh():
        for each in calibration():
            noted("fresh", each.activations)
            yield each

    batches.take = lambda share: noted("steps", take(share))
    batches.buffer.peek = lambda most: noted("first", peek(most))
    batches.calibration = fresh
    while lead.step_number != stop and (share := batches.agree(lead.step_number >= config.total_steps - 1)):
        if lead.step_number == 0:
            _initialise(trainers, batches, routing)
        done = _step(together, batches, share, routing)
    assert {result.ranks for result in done} == {1 if split_of(config, world) == "transcoders" else world}
    writer = CheckpointWriter(checkpoints, 1, rank, world, 2, lambda *news: None)
    if stop is not None:
        kept = trainers if routing.writes else {}
        writer.save(stop, files_of(kept, batches, state.generation, rank)).result()
    else:
        _calibrate(trainers, batches, routing)
    writer.close()
    weights = [safetensors.torch.load(trainer.transcoder.to_bytes()) for trainer in trainers.values()]
    named = dict(zip([member.name for member in config.members()], routing.gather(weights), strict=True))
    return seen, named, world_size()


def joined(found, kind):
    """All ranks' rows of each step, in the order of ranks."""
    steps = max(len(seen[kind]) for seen, _, _ in found)
    parts = [[seen[kind][step] for seen, _, _ in found if step < len(seen[kind])] for step in range(steps)]
    return [{site: torch.cat([p[site] for p in part if p]) for site in SITES} for part in parts]


def alone(member, first, steps, fresh):
    """The weights of one transcoder that knows of no other, trained on these batches."""
    trainer = Trainer(member.config, D, D)
    (sites,) = member.config.model.sites
    keys = (sites.source_key, sites.target_key)
    trainer.initialise(*(first[key] for key in keys))
    for batch in steps:
        trainer.step(*(batch[key] for key in keys))
    if trainer.transcoder.activation.thresholds == "calibrated":
        calibrator = Calibrator(trainer.transcoder)
        for batch in fresh:
            for rows in zip(*(batch[key].split(CALIBRATION_ROWS) for key in keys), strict=True):
                calibrator.add(trainer.calibrated_on(*rows))
        calibrator.finish()
    return safetensors.torch.load(trainer.transcoder.to_bytes())


@pytest.mark.parametrize(
    "starts",
    [
        [(2, "transcoders")],
        [(3, None)],
        [(2, None), (3, None), (1, None)],
        [(2, "tokens"), (2, "transcoders"), (3, "tokens")],
    ],
)
def test_divided_transcoders_are_those_of_one_process_on_the_same_batches(tmp_path, starts):
    """Through checkpoints, of other numbers of trainers and where these divide something else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first, steps, url = None, [], str(tmp_path / "run")
    for number, (world, split) in enumerate(starts):
        config = settings(cluster={"split": split, "num_trainers": world})
        stop = None if number == len(starts) - 1 else 5 * (number + 1)
        found = run_ranks(train_rank, world, tmp_path / str(number), config, url, stop)
        first = first or joined(found, "first")[0]
        steps += joined(found, "steps")
        assert {size for _, _, size in found} == {world}, "only the trainers' own work is alone"
    assert sum(len(batch[SITES[0]]) for batch in steps) == UNITS * TOKENS
    fresh = joined(found, "fresh")
    exact = all(split != "tokens" for _, split in starts)
    for member in settings().members():
        expected = alone(member, first, steps, fresh)
        for _, weights, _ in found:
            for tensor, value in expected.items():
                # Gradients of parts, added up, are rounded otherwise, and Adam makes much of it; a step moves 0.006.
                limits = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 4e-3}
                torch.testing.assert_close(weights[member.name][tensor], value, **limits, equal_nan=True)
    torch.set_num_threads(threads)
    last = Checkpoints(url).latest()
    if last is not None:
        assert not len(read_progress(last).wrong_units())
        assert {f"trainer-{name}.safetensors" for name, _ in settings().members()} < set(last.manifest.files)


class Sick:
    def __init__(self, healthy):
        self.healthy = lambda: healthy


def may_save(rank, world):
    idle = CheckpointWriter(Checkpoints("/nowhere"), 1, rank, world, 2, lambda *news: None)
    return [_all_may_save({"one": Sick(rank != sick)}, idle, Clock()) for sick in (0, 1, 2)]


def test_no_checkpoint_is_begun_while_any_ranks_step_changed_nothing(tmp_path):
    assert run_ranks(may_save, 2, tmp_path / "ranks") == [[False, False, True]] * 2


# Placement ----------------------------------------------------------------------------------------------------------


def test_the_dearest_go_first_to_where_least_is():
    assert place([3, 5, 2, 4, 1], 2) == [[1, 2, 4], [0, 3]]  # 8 and 7
    assert place([1] * 26, 8) == [[rank + 8 * turn for turn in range(4 if rank < 2 else 3)] for rank in range(8)]
    assert place([0.1, 0.1, 9.0], 3) == [[2], [0], [1]]


def test_trainers_divide_the_transcoders_where_each_gets_one():
    config = settings()
    names = [name for name, _ in config.members()]
    for trainers in (2, 3, 6):
        assert split_of(config, trainers) == "transcoders"
        placed = placed_members(config, trainers)
        assert sorted(name for mine in placed for name in mine) == sorted(names) and all(placed)
        assert all(mine == [name for name in names if name in mine] for mine in placed), "in the run's order"
    assert split_of(config, 1) == split_of(config, 7) == "tokens"
    assert placed_members(config, 7) == [names] * 7
    assert split_of(settings(cluster={"split": "tokens"}), 2) == "tokens"


def test_more_trainers_than_transcoders_are_refused_where_these_are_to_be_divided():
    with pytest.raises(ConfigError, match=r"cluster\.split=transcoders with cluster\.num_trainers=7: .* 6 transcoders"):
        settings(cluster={"split": "transcoders", "num_trainers": 7})
    asked = {"model": {"layers": "all"}, "sweep": None, "cluster": {"split": "transcoders", "num_trainers": 4}}
    unknown = settings(**asked)
    assert len(unknown.of_layers(4).members()) == 4
    with pytest.raises(ConfigError, match=r"cluster\.num_trainers=4: the run has 3 transcoders, and each"):
        unknown.of_layers(3)


def test_26_dictionaries_of_65k_features_fit_8_gpus_only_where_they_are_divided():
    def asked(trainers, split):
        cluster = {"num_trainers": trainers, "split": split}
        changes = {"model": {"layers": list(range(26))}, "transcoder": {"group_sizes": [1 << 15, 1 << 15]}}
        return load_preset("gemma-2-2b-layer17", changes | {"cluster": cluster})

    nodes = [Node(64, 8, gpu_memory=80e9)]
    parameters = 2 * 2304 * 65_536 + 65_536 + 2304
    divided, whole = asked(6, None), asked(6, "tokens")
    plan = make_plan(divided, nodes, 2304)
    assert plan.transcoders == (5, 5, 4, 4, 4, 4)
    assert "5 + 5 + 4 + 4 + 4 + 4 transcoders, each with one trainer" in plan.describe()
    info = ModelInfo("gemma2", 26, 2304, 8192, 256_000, 9216, 8, 2048, 1024, True)
    check_memory(divided, plan, info, disk=math.inf)
    need = training_bytes(divided, info, 6, on_gpu=True)
    assert 16 * 5 * parameters < need.weights < 17 * 5 * parameters
    assert 12 * 5 * parameters < need.checkpoint < 13 * 5 * parameters + 36 * parameters
    with pytest.raises(ConfigError, match=r"26 transcoders .*: the training takes .* of a GPU.s memory"):
        check_memory(whole, make_plan(whole, nodes, 2304), info)
    one = asked(1, None)
    with pytest.raises(ConfigError, match=r"; or with cluster\.num_trainers=3, which divide the transcoders$"):
        check_memory(one, make_plan(one, nodes, 2304), info)
    few = divided.model_copy(update={"cluster": divided.cluster.model_copy(update={"min_trainers": 1})})
    with pytest.raises(ConfigError, match=r"^where cluster\.min_trainers=1 go on alone, .* of a GPU's memory"):
        check_memory(few, plan, info, disk=math.inf)
    changes = {"model": {"layers": [0, 1]}, "transcoder": {"group_sizes": [1 << 19]}, "cluster": {"num_trainers": 1}}
    two = load_preset("gemma-2-2b-layer17", changes)
    with pytest.raises(ConfigError, match=r"; or with cluster\.num_trainers=2, which divide the transcoders$"):
        check_memory(two, make_plan(two, nodes, 2304), info)
    # All of them are as fast as the slowest is, which has 5 of the 26 steps.
    assert 6 * trainer_rate(divided, 2304, 6) == pytest.approx(26 / 5 * trainer_rate(one, 2304))
    assert trainer_rate(whole, 2304, 6) == trainer_rate(one, 2304)
