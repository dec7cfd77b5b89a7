"""Causal attention over windows that lie one after another in a single row, without padding between them.

Everything else in a layer treats tokens one by one, so a batch of windows of any lengths is run as one row of tokens
and no position is wasted; only attention has to know where windows begin. It does so in one of two ways:

Rectangles: windows of one length are viewed as a rectangle, others gathered into rectangles of similar length, padded
on the right. A causal token never looks at what comes after it, so padding needs no mask and the fastest kernels
apply. CPUs take nothing else.

One row: on a GPU, compiled FlexAttention (https://arxiv.org/abs/2412.05496) takes the row as it is, with a mask that
says which blocks of 128 keys a block of 128 queries sees. One kernel serves all lengths, with a sliding window and
without, and it can cap the scores, as Gemma 2 does and no other fast kernel can (torch.nn.attention.varlen, for one,
takes windows in a row but no cap). Windows of one length whose scores are neither capped nor cut off stay a rectangle.

transformers calls `attend` for a model that was loaded with `attn_implementation=NAME`; the windows reach it as the
keyword argument `windows` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mtc.devices import send
from mtc.language_model.flex import Kernel, block_mask

NAME = "mtc_windows"
LEAST_FILL = 0.8
"""Smallest share of a rectangle's width that a window which joins it fills."""
LEAST_FLEX = 256
"""Fewest tokens of a row for which a compiled kernel is worth its mask; two blocks, so that no dimension of the mask is
1."""
LEAST_HEAD = 16
"""Smallest width of a head for which Triton multiplies matrices."""


class Rectangle(NamedTuple):
    """Windows of similar lengths that attention takes together."""

    windows: int
    """Number of windows in the rectangle: its rows."""
    width: int
    """Positions of the rectangle's longest window: its columns."""
    first: int
    """First token in the packed row, if the windows lie there without a gap and have one length; else -1."""
    gather: Tensor | None
    """[windows * width] int64: packed position of each place of the rectangle, anything on padding."""
    real: Tensor | None
    """[tokens] int64: places of the rectangle that are not padding."""
    scatter: Tensor | None
    """[tokens] int64: packed positions of the places in `real`."""


class Patterns:
    """Where each head of each layer looks, of one window: kept in the first pass, and the same in every later one.

    What a pass gives is then linear in the values, with gradients through them alone.
    """

    def __init__(self) -> None:
        self._kept: dict[nn.Module, Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None,
        reach: int | None,
    ) -> Tensor:  # fmt: skip
        """Shapes as those of `attend`, but [1, heads, tokens, head_dim] of the result."""
        if module not in self._kept:
            self._kept[module] = pattern(query.detach(), key.detach(), scale, softcap, reach)
        return self._kept[module] @ _repeat(value, query)


class Rows:
    """Rows of tokens of one length that go on from what a cache holds, each with its own keys and values."""

    def __init__(self, leading: int | None = None):
        """With `leading`, which is half of the rows, the others look where these do, one by one."""
        self._leading = leading

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, reach: int | None
    ) -> Tensor:
        """`query` is [rows, heads, new tokens, head_dim], `key` and `value` have the earlier tokens in front; returns
        the shape of `query`."""
        looked = pattern(query[: self._leading], key[: self._leading], scale, softcap, reach)
        if self._leading is not None:
            looked = looked.repeat(2, 1, 1, 1)
        return looked @ _repeat(value, query)


class Windows:
    """Windows of these `lengths`, packed in this order on `device`, for one forward pass.

    What attention needs to know of them is made when a layer first asks for it, and serves the other layers too.
    Without a `kernel` they are taken as rectangles. With `patterns`, which are of one window, attention looks where it
    looked in the pass that these were kept in.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        kernel: Kernel | None = None,
        patterns: Patterns | None = None,
    ):
        self.lengths = [length for length in lengths if length]
        self.tokens = sum(self.lengths)
        self.longest = max(self.lengths, default=0)
        self.kernel = kernel
        self.patterns = patterns
        self._device = device
        self._masks: dict[int | None, Any] = {}

    @property
    def alike(self) -> bool:
        """Whether all windows have one length."""
        return all(length == self.longest for length in self.lengths)

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """The windows that are taken together where they are not taken as one row."""
        starts = np.cumsum([0, *self.lengths]).tolist()
        groups: list[list[int]] = []
        for i in sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)):
            width = self.lengths[groups[-1][0]] if groups else 0
            if not groups or self.lengths[i] < LEAST_FILL * width:
                groups.append([])
            groups[-1].append(i)
        return [_rectangle([(starts[i], self.lengths[i]) for i in group], self._device) for group in groups]

    def mask(self, reach: int | None) -> Any:
        """FlexAttention's BlockMask of the row of windows; `reach` is how far a token sees, itself included."""
        if reach not in self._masks:
            self._masks[reach] = block_mask(self.lengths, reach, self._device)
        return self._masks[reach]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    windows: Windows | Rows | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention inside each window, as transformers calls it.

    `query` is [1, heads, tokens, head_dim], `key` and `value` may have fewer heads; returns [1, tokens, heads,
    head_dim]. `softcap` bounds the scores as Gemma 2 does, `sliding_window` is how far a token sees, itself included.
    Raises ValueError for windows that are not those of the row.
    """
    if isinstance(windows, Rows):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return windows.attend(query, key, value, scale, softcap, sliding_window).transpose(1, 2), None
    if windows is None or windows.tokens != query.shape[2] or len(query) != 1:
        tokens = windows.tokens if windows is not None else 0
        raise ValueError(f"windows of {tokens} tokens, but the row has shape {list(query.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    reach = sliding_window if sliding_window is not None and sliding_window < windows.longest else None
    if windows.patterns is not None:
        return windows.patterns.attend(module, query, key, value, scale, softcap, reach).transpose(1, 2), None
    if windows.kernel is not None and _as_one_row(windows, query, softcap, reach):
        out = windows.kernel.attend(query, key, value, windows.mask(reach), scale, softcap)
        if out is not None:
            return out.transpose(1, 2), None
    columns = [part.transpose(1, 2)[0] for part in (query, key, value)]  # [tokens, heads, head_dim]
    result = torch.empty((*columns[0].shape[:2], columns[2].shape[2]), dtype=value.dtype, device=value.device)
    for rectangle in windows.rectangles:
        q, k, v = (_take(column, rectangle).transpose(1, 2) for column in columns)  # [windows, heads, width, head_dim]
        near = reach if reach is not None and reach < rectangle.width else None
        out = _plain(q, k, v, scale, near) if softcap is None else _soft_capped(q, k, v, scale, softcap, near)
        _put(result, out.transpose(1, 2), rectangle)
    return result.unsqueeze(0), None


AttentionInterface.register(NAME, attend)


def _as_one_row(windows: Windows, query: Tensor, softcap: float | None, reach: int | None) -> bool:
    """Whether the compiled kernel over the whole row is faster than rectangles."""
    if windows.tokens < LEAST_FLEX or query.shape[-1] < LEAST_HEAD:
        return False
    return softcap is not None or reach is not None or not windows.alike


# Windows as rectangles ----------------------------------------------------------------------------------------------


def _rectangle(group: list[tuple[int, int]], device: torch.device | str) -> Rectangle:
    """The Rectangle of windows given as (first token, length), longest first."""
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
    return pattern(q, k, scale, softcap, reach) @ _repeat(v, q)


def pattern(q: Tensor, k: Tensor, scale: float, softcap: float | None, reach: int | None) -> Tensor:
    """Softmax of the scores of each query, [windows, heads, queries, keys], from [windows, heads, queries, head_dim]
    and [windows, key heads, keys, head_dim]; the queries are of the last keys."""
    scores = q @ _repeat(k, q).transpose(2, 3)
    scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~_visible(k.shape[2], reach, q.device)[-q.shape[2] :], -torch.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def _repeat(column: Tensor, query: Tensor) -> Tensor:
    """Key or value heads repeated, so that each query head has one."""
    times = query.shape[1] // column.shape[1]
    return column if times == 1 else column.repeat_interleave(times, dim=1)


@lru_cache(maxsize=64)
def _visible(width: int, reach: int | None, device: torch.device) -> Tensor:
    """[width, width] bool: which keys (columns) a query (row) sees."""
    mask = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return mask if reach is None else mask.triu(1 - reach)
