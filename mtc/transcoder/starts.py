"""Where the encoder starts: at directions that the MLP's own neurons look for, or at source tokens.

Of the neurons those come first that alone explain most of the target on the first activations: the strength of a
direction w is the squared error that one decoder row for relu(w . (x - mean(x))) takes away,

    |sum over tokens of z (y - mean(y))|^2 / sum of z^2,     z = relu(w . (x - mean(x)))

as the first step of matching pursuit would choose. What is a copy of an earlier row is left out: features that start
equal stay equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mtc.transcoder.distributed import all_gather, all_reduce, distributed

COPY_COSINE = 0.95
"""Cosine above which a row is a copy of another one."""
_TOKENS, _ROWS = 2048, 256  # at a time


def strongest_first(directions: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[n] int64: the order of `directions` [n, d_source], norm 1, from the strongest down, by all ranks' tokens.

    x [tokens, d_source] and y [tokens, d_target] are sources and targets without their means.
    """
    along = x.new_zeros(len(directions), y.shape[1], dtype=torch.float64)
    squares = x.new_zeros(len(directions), dtype=torch.float64)
    for some_x, some_y in zip(x.split(_TOKENS), y.split(_TOKENS), strict=True):
        z = torch.relu(some_x @ directions.T)
        along += (z.T @ some_y).double()
        squares += z.square().sum(0, dtype=torch.float64)
    all_reduce(along)
    all_reduce(squares)
    strength = along.square().sum(1) / squares.clamp(min=1e-30)
    return strength.argsort(descending=True, stable=True)


def distinct(rows: Tensor, count: int) -> Tensor:
    """[at most count] int64: the first of `rows` [n, d], norm 1, none a copy of an earlier one that is among them."""
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
    return kept[:count]


def draw_distinct(rows: Tensor, count: int, seed: int) -> Tensor:
    """`count` random directions of all ranks' `rows` [tokens, d], norm 1, [count, d]; the same on every rank and
    however rows are spread.

    None is a copy of another as long as there are enough that differ; then noise as long as the rows is added.
    """
    sizes = all_gather(torch.tensor(len(rows)))
    total, before = int(sizes.sum()), int(sizes[: dist.get_rank() if distributed() else 0].sum())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    drawn = rows.new_empty(0, rows.shape[1])
    for index in order.split(2 * count):
        mine = ((index >= before) & (index < before + len(rows))).nonzero().squeeze(1)
        more = rows.new_zeros(len(index), rows.shape[1])
        more[mine.to(more.device)] = rows[(index[mine] - before).to(rows.device)]
        all_reduce(more)
        drawn = torch.cat([drawn, unit(more)])
        drawn = drawn[distinct(drawn, count)]
        if len(drawn) == count:
            return drawn
    index = torch.arange(count - len(drawn)) % max(1, len(drawn))
    noise = torch.randn(len(index), rows.shape[1], generator=generator).to(rows)
    return torch.cat([drawn, unit(drawn[index.to(drawn.device)] + unit(noise))]) if len(drawn) else unit(noise)


def unit(rows: Tensor) -> Tensor:
    """Rows [n, d] with norm 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6)
