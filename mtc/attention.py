"""Causal attention over windows that lie one after another in a single row, without padding between them.

Everything else in a layer treats tokens one by one, so a batch of windows of any lengths is run as one row of tokens
and no position is wasted; only attention has to know where windows begin. Windows of one length are viewed as a
rectangle. Others are gathered into rectangles of similar length, padded on the right: a causal token never looks at
what comes after it, so padding needs no mask and the fastest kernels apply.

transformers calls `attend` for a model that was loaded with `attn_implementation=NAME`; the windows reach it as the
keyword argument `windows` of the model's forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mtc.devices import send

logger = logging.getLogger(__name__)

NAME = "mtc_windows"
LEAST_FILL = 0.8
"""A window joins a rectangle if it fills at least this share of its width."""
LEAST_FLEX = 256
"""Width from which soft-capped attention on a GPU is worth a compiled kernel."""


class Rectangle(NamedTuple):
    """Windows of similar lengths that attention takes together."""

    windows: int
    """Rows."""
    width: int
    """Positions of the longest."""
    first: int
    """First token in the packed row, if the windows lie there without a gap and have one length; else -1."""
    gather: Tensor | None
    """[windows * width] int64: packed position of each place of the rectangle, anything on padding."""
    real: Tensor | None
    """[tokens] int64: places of the rectangle that are not padding."""
    scatter: Tensor | None
    """[tokens] int64: their packed positions."""


def make_rectangles(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Rectangle]:
    """How windows of these `lengths`, packed in this order, are taken together."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups: list[list[int]] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        width = lengths[groups[-1][0]] if groups else 0
        if not groups or lengths[i] < LEAST_FILL * width:
            groups.append([])
        groups[-1].append(i)
    return [_rectangle([(starts[i], lengths[i]) for i in group], device) for group in groups]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    windows: Sequence[Rectangle] = (),
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention inside each window, as transformers calls it.

    `query` is [1, heads, tokens, head_dim], `key` and `value` may have fewer heads; returns [1, tokens, heads,
    head_dim]. `softcap` bounds the scores as Gemma 2 does, `sliding_window` is how far a token sees, itself included.
    """
    tokens = sum(w.windows * w.width if w.real is None else len(w.real) for w in windows)
    if tokens != query.shape[2] or len(query) != 1:
        raise ValueError(f"windows of {tokens} tokens, but the row has shape {list(query.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    columns = [part.transpose(1, 2)[0] for part in (query, key, value)]  # [tokens, heads, head_dim]
    result = torch.empty((*columns[0].shape[:2], columns[2].shape[2]), dtype=value.dtype, device=value.device)
    for rectangle in windows:
        q, k, v = (_take(column, rectangle).transpose(1, 2) for column in columns)  # [windows, heads, width, head_dim]
        reach = sliding_window if sliding_window is not None and sliding_window < rectangle.width else None
        out = _plain(q, k, v, scale, reach) if softcap is None else _soft_capped(q, k, v, scale, softcap, reach)
        _put(result, out.transpose(1, 2), rectangle)
    return result.unsqueeze(0), None


AttentionInterface.register(NAME, attend)


def _rectangle(group: list[tuple[int, int]], device: torch.device | str) -> Rectangle:
    """Of windows given as (first token, length), longest first."""
    width, first = group[0][1], group[0][0]
    if all(length == width and start == first + i * width for i, (start, length) in enumerate(group)):
        return Rectangle(len(group), width, first, None, None, None)
    starts = torch.tensor([start for start, _ in group])
    lengths = torch.tensor([length for _, length in group])
    column = torch.arange(width)
    real = column < lengths[:, None]  # [windows, width]
    gather = torch.where(real, starts[:, None] + column, starts[:, None]).flatten()
    places = real.flatten().nonzero().squeeze(1)
    parts = (send(part, device) for part in (gather, places, gather[places]))
    return Rectangle(len(group), width, -1, *parts)


def _take(column: Tensor, rectangle: Rectangle) -> Tensor:
    """[tokens, heads, head_dim] -> [windows, width, heads, head_dim], a view where that is possible."""
    if rectangle.gather is None:
        column = column[rectangle.first : rectangle.first + rectangle.windows * rectangle.width]
    else:
        column = column.index_select(0, rectangle.gather)
    return column.unflatten(0, (rectangle.windows, rectangle.width))


def _put(result: Tensor, out: Tensor, rectangle: Rectangle) -> None:
    """Write [windows, width, heads, head_dim] to its places in [tokens, heads, head_dim]."""
    rows = out.flatten(0, 1)
    if rectangle.gather is None:
        result[rectangle.first : rectangle.first + len(rows)] = rows
    else:
        assert rectangle.real is not None and rectangle.scatter is not None
        result.index_copy_(0, rectangle.scatter, rows.index_select(0, rectangle.real))


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: int | None) -> Tensor:
    mask = None if reach is None else _visible(q.shape[2], reach, q.device)
    if mask is not None or v.shape[-1] > 256:  # the fast kernels share key heads only without a mask
        k, v = _repeat(k, q), _repeat(v, q)
    shared = k.shape[1] != q.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, reach: int | None) -> Tensor:
    if q.is_cuda and q.shape[2] >= LEAST_FLEX and (out := _flex(q, k, v, scale, softcap, reach)) is not None:
        return out
    k, v = _repeat(k, q), _repeat(v, q)
    scores = (q @ k.transpose(2, 3)).mul_(scale / softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~_visible(q.shape[2], reach, q.device), -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _repeat(column: Tensor, query: Tensor) -> Tensor:
    """Key or value heads, one for each query head."""
    times = query.shape[1] // column.shape[1]
    return column if times == 1 else column.repeat_interleave(times, dim=1)


@lru_cache(maxsize=64)
def _visible(width: int, reach: int | None, device: torch.device) -> Tensor:
    """[width, width] bool: which keys (columns) a query (row) sees."""
    mask = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return mask if reach is None else mask.triu(1 - reach)


# Soft-capped attention as one kernel -------------------------------------------------------------------------------


_flex_failed = False


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, reach: int | None) -> Tensor | None:
    """FlexAttention, compiled; None where it can't be compiled, said once."""
    global _flex_failed
    if _flex_failed:
        return None
    try:
        mask = _flex_mask(q.shape[2], reach, q.device)
        score = _flex_score(softcap)
        shared = k.shape[1] != q.shape[1]
        with torch._dynamo.config.patch(specialize_float=True):  # the kernel takes the cap only as a constant
            return _compiled_flex()(q, k, v, score_mod=score, block_mask=mask, scale=scale, enable_gqa=shared)
    except Exception as error:  # compilers fail in many ways; the plain operations give the same result, slower
        logger.warning("soft-capped attention runs without a compiled kernel: %s: %s", type(error).__name__, error)
        _flex_failed = True
        return None


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=64)
def _flex_mask(width: int, reach: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        before = key <= query
        return before if reach is None else before & (query - key < reach)

    return create_block_mask(visible, None, None, width, width, device=str(device))


@lru_cache(maxsize=8)
def _flex_score(softcap: float) -> Callable[..., Tensor]:
    return partial(_capped, softcap)


def _capped(softcap: float, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return softcap * torch.tanh(score / softcap)
