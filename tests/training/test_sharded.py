"""One dictionary over several ranks equals the same on one, in groups of processes over gloo."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from safetensors.torch import load_file

from mtc import devices
from mtc.config import ConfigError, load_preset
from mtc.storage import RunDirectory
from mtc.training import Calibrator, Trainer, assemble, read_shards, shard_bytes
from mtc.transcoder import MatryoshkaTranscoder, Shard, load_transcoder

D = 12
TOKENS = 64
STEPS = 12


def config_of(transcoder=None, **optimizer):
    settings = {"group_sizes": [5, 22, 37], "dead_after_tokens": 64, "aux_k": 2, "k": 2}
    return load_preset(
        "tiny",
        {
            "transcoder": settings | (transcoder or {}),
            # Adam divides a gradient that is zero but for rounding by itself: a larger epsilon keeps that out.
            "optimizer": {"batch_tokens": TOKENS, "precision": "float32", "eps": 1e-4, "warmup_steps": 4} | optimizer,
            "data": {"num_tokens": TOKENS * STEPS},
        },
    )


def batches(steps, seed=5):
    """A planted dictionary that only a sparse code can express, with two massive tokens in each batch."""
    generator = torch.Generator().manual_seed(seed)
    read, write = torch.randn(40, D, generator=generator), torch.randn(40, D, generator=generator)
    for _ in range(steps):
        z = torch.rand(TOKENS, 40, generator=generator) * (torch.rand(TOKENS, 40, generator=generator) < 0.08)
        target = z @ write - 0.3
        target[::32] *= 40
        yield z @ read + 0.5, target


def train(trainer, data):
    """Metrics of a step on each batch, all of which every rank has; the threshold is calibrated behind them."""
    found = []
    for x, y in data:
        if not trainer.step_number:
            trainer.initialise(x, y)
        found.append(trainer.step(x, y).metrics())
    if trainer.transcoder.activation.thresholds == "calibrated":
        calibrator = Calibrator(trainer.transcoder)
        for x, y in batches(4, seed=6):
            calibrator.add(trainer.calibrated_on(x, y))
        calibrator.finish()
    return found


def whole(directory, state, shard):
    """All ranks' shares put together through their files; called on every rank."""
    (directory / f"{shard.ranks}-{shard.rank}").write_bytes(shard_bytes(state, shard))
    if shard.ranks > 1:
        torch.distributed.barrier()
    return read_shards(
        [f"{directory}/{shard.ranks}-{rank}" for rank in range(shard.ranks)], shard._replace(rank=0, ranks=1)
    )


def trained(directory, transcoder, optimizer, pretending, rank, world):
    devices.PRETENDING = pretending  # to be a GPU, in a process of its own
    trainer = Trainer(config_of(transcoder, **optimizer), D, D, split="features")
    metrics = train(trainer, batches(STEPS))
    local = trainer.transcoder.state_dict()
    common = {name: local[name] for name in ("b_dec", "W_skip", "target_scale", "massive_norm") if name in local}
    return [m._asdict() for m in metrics], whole(directory, trainer.state_dict(), trainer.shard), common


def check_equal(one, many, rtol=1e-3, atol=1e-4):
    assert one.keys() == many.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            many[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("worlds", "transcoder", "optimizer", "pretending"), [
    ((2, 4), {"skip": True, "massive_tokens": "cap"}, {}, False),
    ((3,), {"rank": "contribution", "prefix_weights": [1, 2, 3]}, {}, True),
    ((3,), {"activation": "topk", "rank": "contribution"}, {}, False),
    ((2,), {"activation": "jumprelu", "massive_tokens": "cap"}, {}, False),
    # More ranks propose more entries by the rounded product: the choice is that of float32, of AuxK not always.
    ((2,), {"activation": "topk", "aux_coefficient": 0}, {"precision": "bfloat16"}, False),
    ((2,), {"aux_coefficient": 0}, {"precision": "bfloat16"}, False),
])  # fmt: skip
def test_features_over_ranks_equal_one_rank(tmp_path, worlds, transcoder, optimizer, pretending):
    trainer = Trainer(config_of(transcoder, backend="sparse"), D, D)
    metrics, state = train(trainer, batches(STEPS)), trainer.state_dict()
    assert len(trainer.dead_index) > 2, "AuxK must choose for this test to say anything"
    for world in worlds:
        results = run_ranks(trained, world, tmp_path / str(world), tmp_path, transcoder, optimizer, pretending)
        for history, found, common in results:
            for one, many in zip(metrics, history, strict=True):
                for name, value in one._asdict().items():
                    assert many[name] == pytest.approx(value, rel=2e-3), name
            check_equal(state, found | {"compute.sparse": state["compute.sparse"]})
            for name, value in common.items():
                assert torch.equal(value, results[0][2][name]), f"{name} is to be the same to the last bit on all ranks"


def saved_at_half(directory, rank, world):
    trainer = Trainer(config_of({"skip": True}), D, D, split="features")
    train(trainer, list(batches(STEPS))[: STEPS // 2])
    (directory / f"half-{rank}").write_bytes(shard_bytes(trainer.state_dict(), trainer.shard))
    train(trainer, list(batches(STEPS))[STEPS // 2 :])
    return whole(directory, trainer.state_dict(), trainer.shard)


def resumed(directory, saved, rank, world):
    trainer = Trainer(config_of({"skip": True}), D, D, split="features")
    trainer.load_state_dict(read_shards([f"{directory}/half-{rank}" for rank in range(saved)], trainer.shard))
    train(trainer, list(batches(STEPS))[STEPS // 2 :])
    return whole(directory, trainer.state_dict(), trainer.shard)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    straight, *_ = run_ranks(saved_at_half, 4, tmp_path / "four", tmp_path)
    for world in (4, 3, 1):
        for found in run_ranks(resumed, world, tmp_path / str(world), tmp_path, 4):
            check_equal(straight, found, *([0, 0] if world == 4 else []))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_shares_are_those_of_torchs_checkpoints(tmp_path):
    run_ranks(saved_at_half, 3, tmp_path / "ranks", tmp_path)
    directory = tmp_path / "dcp"
    directory.mkdir()
    for rank in range(3):
        (tmp_path / f"half-{rank}").rename(directory / f"{rank}.safetensors")
    state = read_shards(map(str, directory.iterdir()), Shard(0, 1, (5, 22, 37)))
    groups = {f"transcoder.W_dec/{g}": torch.zeros(size, D) for g, size in enumerate((5, 22, 37))}
    read = groups | {"transcoder.b_dec": torch.zeros(D), "step": torch.tensor(0)}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert int(read["step"]) == STEPS // 2
    assert torch.equal(torch.cat([read[name] for name in groups]), state["transcoder.W_dec"])
    assert torch.equal(read["transcoder.b_dec"], state["transcoder.b_dec"])
    (directory / "1.safetensors").unlink()
    with pytest.raises(ValueError, match="43 of this rank's 64 rows of"):
        read_shards(map(str, directory.iterdir()), Shard(0, 1, (5, 22, 37)))


def test_the_weights_file_is_assembled_and_read_by_prefix(tmp_path):
    config = config_of({"rank": "contribution", "skip": True})
    run_ranks(trained, 3, tmp_path / "ranks", tmp_path, {"rank": "contribution", "skip": True}, {}, False)
    paths = [f"{tmp_path}/3-{rank}" for rank in range(3)]
    state = read_shards(paths, Shard(0, 1, (5, 22, 37)))
    alone = Trainer(config, D, D)
    alone.load_state_dict(state)
    assemble(paths, alone.transcoder.shape, f"{tmp_path}/whole")
    (tmp_path / "alone").write_bytes(alone.transcoder.to_bytes())
    assert load_file(tmp_path / "whole").keys() == load_file(tmp_path / "alone").keys()
    check_equal(load_file(tmp_path / "alone"), load_file(tmp_path / "whole"), 0, 0)
    with pytest.raises(ValueError, match="are those of all ranks given"):
        assemble(paths[:2], alone.transcoder.shape, f"{tmp_path}/part")

    (x, _), *_ = batches(1)
    (tmp_path / "whole").rename(tmp_path / "transcoder.safetensors")
    part = load_transcoder(RunDirectory(str(tmp_path)), prefix=27)
    assert part.prefixes == (5, 27)
    assert torch.equal(part.encode(x), alone.transcoder.encode(x, 27))
    torch.testing.assert_close(part.reconstruct(x), alone.transcoder.reconstruct(x, 27))
    with pytest.raises(ValueError, match=r"prefix=6 is not one of the nested dictionaries \[5, 27, 64\]"):
        load_transcoder(RunDirectory(str(tmp_path)), prefix=6)


def test_a_prefix_of_topk_is_refused(tmp_path):
    topk = Trainer(config_of({"activation": "topk"}), D, D).transcoder
    (tmp_path / "file").write_bytes(topk.to_bytes())
    with pytest.raises(ValueError, match="prefix=27: features of a TopK"):
        MatryoshkaTranscoder.load(f"{tmp_path}/file", prefix=27)
    assert MatryoshkaTranscoder.load(f"{tmp_path}/file", prefix=64).num_features == 64


def refusals(rank, world):
    with pytest.raises(ConfigError, match=r"2 trainers cannot share a group of 1 features"):
        Trainer(config_of({"group_sizes": [1, 63]}), D, D, split="features")
    with pytest.raises(ConfigError, match="dense"):
        Trainer(config_of(backend="dense"), D, D, split="features")
    trainer = Trainer(config_of(), D, D, split="features")
    with pytest.raises(ValueError, match=f"rank {rank} has a share"):
        trainer.transcoder.to_bytes()
    return trainer.shard.places.tolist()


def test_ranks_have_a_share_of_every_group(tmp_path):
    first, second = run_ranks(refusals, 2, tmp_path / "ranks")
    assert first == [0, 1, *range(5, 16), *range(27, 45)]
    assert sorted(first + second) == list(range(64))
