"""Directions for the encoder to start from, none a copy of another: features that start equal stay equal."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mtc.transcoder.distributed import all_gather, all_reduce, broadcast, distributed

COPY_COSINE = 0.95
"""Cosine above which a row is a copy of another one."""
_ROWS = 256  # compared at a time
_DRAWN = 4096  # drawn at a time


def distinct(rows: Tensor, count: int) -> Tensor:
    """[at most count] int64: the first of `rows` [n, d], norm 1, none a copy of an earlier one that is among them.

    With several ranks it is rank 0's answer: their devices may round a cosine to different sides of the border."""
    kept = torch.empty(0, dtype=torch.int64, device=rows.device)
    for block in torch.arange(len(rows), device=rows.device).split(_ROWS):
        if len(kept) >= count:
            break
        fresh = block[(rows[block] @ rows[kept].T > COPY_COSINE).sum(1) == 0]
        copies = (rows[fresh] @ rows[fresh].T > COPY_COSINE).cpu()
        chosen: list[int] = []
        for at in range(len(fresh)):
            if not copies[at, chosen].any():
                chosen.append(at)
        kept = torch.cat([kept, fresh[chosen]])
    (answer,) = broadcast(kept[:count].tolist())
    return torch.tensor(answer, dtype=torch.int64, device=rows.device)


def draw_distinct(rows: Tensor, count: int, seed: int, drawn: Tensor, keep: Tensor | None = None) -> Tensor:
    """[count, d]: `drawn` [n, d], norm 1, and behind it random directions of all ranks' `rows` [tokens, d], norm 1; the
    same on every rank and however rows are spread. With `keep` [k] int64, increasing, [k, d]: only those of them.

    None is a copy of another as long as there are enough that differ; then noise as long as the rows is added. Memory:
    what is returned, and a few times all ranks' rows.
    """
    sizes = all_gather(torch.tensor(len(rows)))
    total, before = int(sizes.sum()), int(sizes[: dist.get_rank() if distributed() else 0].sum())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    for index in order.split(2 * count):
        if len(drawn) == count:
            break
        mine = ((index >= before) & (index < before + len(rows))).nonzero().squeeze(1)
        more = rows.new_zeros(len(index), rows.shape[1])
        more[mine.to(more.device)] = rows[(index[mine] - before).to(rows.device)]
        all_reduce(more)
        drawn = torch.cat([drawn, unit(more)])
        drawn = drawn[distinct(drawn, count)]
    keep = torch.arange(count) if keep is None else keep
    first, rest = keep[keep < len(drawn)].to(drawn.device), keep[keep >= len(drawn)] - len(drawn)
    if not len(rest):
        return drawn[first]
    noise = unit(normal_rows(count - len(drawn), rows.shape[1], generator, rest).to(rows))
    if len(drawn):
        noise = unit(drawn[(rest % len(drawn)).to(drawn.device)].add_(noise))
    return torch.cat([drawn[first], noise])


def normal_rows(count: int, width: int, generator: torch.Generator, keep: Tensor | None = None) -> Tensor:
    """[count, width] float32, standard normal numbers; with `keep` [k] int64, increasing, [k, width]: only those rows,
    without the memory of the others."""
    keep = torch.arange(count) if keep is None else keep
    rows = torch.empty(len(keep), width, dtype=torch.float32)  # not the default, which transformers changes
    for first in range(0, count, _DRAWN):
        block = torch.randn(min(_DRAWN, count - first), width, generator=generator, dtype=torch.float32)
        low, high = torch.searchsorted(keep, torch.tensor([first, first + _DRAWN])).tolist()
        rows[low:high] = block[keep[low:high] - first]
    return rows


def unit(rows: Tensor) -> Tensor:
    """Rows [n, d] with norm 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
