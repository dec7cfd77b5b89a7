"""Ranks of a gloo group, each in a process of its own, forked from one that has imported what conftest.py says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, directory: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments, rank, world)`, a module's own, returns on each rank; files of the group go into
    `directory`, which is made. One rank alone is this process."""
    directory.mkdir(parents=True)
    if world == 1:
        return [function(*arguments, 0, 1)]
    mp.start_processes(_rank, (world, directory, function, arguments), nprocs=world, start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=world)
    dist.barrier()  # where the first collective is one-way, as in DDP, gloo may hang while it connects
    torch.save(function(*arguments, rank, world), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
