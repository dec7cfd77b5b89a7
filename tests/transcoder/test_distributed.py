"""What ranks tell each other, in processes of a gloo group."""

import json
import multiprocessing
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cluster.train_worker import _agree_on_start
from mtc.storage import Checkpoints, CheckpointWriter
from mtc.transcoder import Averaging

WORLD = 2


def run_ranks(function, directory):
    """What `function(directory, rank)` returns on each rank."""
    multiprocessing.set_forkserver_preload(["test_distributed"])
    mp.start_processes(_rank, args=(function.__name__, str(directory)), nprocs=WORLD, start_method="forkserver")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD)]


def _rank(rank, function, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=WORLD)
    dist.barrier()
    found = globals()[function](directory, rank)
    dist.barrier()
    dist.destroy_process_group()
    Path(directory, f"{rank}.json").write_text(json.dumps(found))


def agree(directory, rank):
    ray.get = lambda answer, timeout: answer
    log = SimpleNamespace(choose=SimpleNamespace(remote=lambda name: None))
    starts = [_agree_on_start(Checkpoints(f"{directory}/{run}"), rank, log) for run in ("new", "begun")]
    return [(start.checkpoint and start.checkpoint.name, start.number) for start in starts]


def test_ranks_start_from_the_same_checkpoint_whatever_its_name(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "begun"))
    writer = CheckpointWriter(checkpoints, 1, 0, 1, 2, lambda *event: None)
    writer.save(10**60, {"weights": lambda: b"1"}).result()
    writer.close()
    first, second = run_ranks(agree, tmp_path)
    assert first == second
    (none, number), (name, other) = first
    assert none is None
    assert name == checkpoints.latest().name
    assert number != other, "of a start"


def average(directory, rank):
    """Ranks' buffers are their own; gradients are of all."""
    module = nn.BatchNorm1d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaging = Averaging(module, torch.device("cpu"))
        module.running_mean += rank
        averaging.backward((averaging.module(torch.ones(2, 3)) * (1 + rank)).sum())
    module.eval()
    averaging.module(torch.ones(2, 3))
    return [module.running_mean.tolist(), module.bias.grad.tolist()]


def test_gradients_are_averaged_and_buffers_stay_without_a_warning(tmp_path):
    (first, gradient), (second, same) = run_ranks(average, tmp_path)
    assert gradient == same == [3.0] * 3
    assert second == pytest.approx([a + 0.9 for a in first])
