"""Attention over windows in one row by compiled FlexAttention (https://arxiv.org/abs/2412.05496), and its compiler.

A BlockMask says which blocks of 128 keys a block of 128 queries sees; it is made from the windows' lengths, for all
layers of a pass. One kernel serves all lengths, with a sliding window and without, and can cap the scores.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtc.devices import send

logger = logging.getLogger(__name__)
BLOCK = 128
"""Queries, and keys, of one block of the mask: FlexAttention's own, which the blocks of its kernels divide."""
MOST_KERNELS = 64
"""Compilations of one function, of all models of a process together, before torch would give up; its default is 8."""


class Kernel:
    """Compiled FlexAttention of one model, which takes rectangles again once it can't be compiled."""

    failed: str | None = None
    """What kept the kernel from being compiled, such as "InductorError: ..."; None if nothing did."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, softcap: float | None
    ) -> Tensor | None:
        """Attention [1, heads, tokens, head_dim] of a query of that shape to keys and values that may have fewer heads.

        None where it can't be compiled, said once. Every other error is raised, a lack of memory above all: it passes.
        Where `compiler_settings` are not in force, a second scale or cap may fail to compile.
        """
        if self.failed is not None:
            return None
        score = None if softcap is None else _flex_score(softcap)
        options = _options_here(query.device, query.shape[-1], query.element_size()) if query.is_cuda else None
        shared = key.shape[1] != query.shape[1]
        # A key that a query does not see has the weight 0, and 0 times a value that is not a number is not one: of a
        # block of keys, one would spoil every query, also of other windows. What sees it must still tell, by its score.
        key = key + 0 * value.sum(-1, keepdim=True)
        value = value.nan_to_num(0.0)
        try:
            return _compiled_flex()(
                query, key, value, score_mod=score, block_mask=mask, scale=scale, enable_gqa=shared,
                kernel_options=options,
            )  # fmt: skip
        except Exception as error:
            self.failed = compiler_failure(error)
            if self.failed is None:
                raise
        logger.warning("attention runs without a compiled kernel, slower: %s", self.failed)
        return None


def block_mask(lengths: Sequence[int], reach: int | None = None, device: torch.device | str = "cpu") -> Any:
    """FlexAttention's BlockMask of windows that lie one after another, without looking at pairs of tokens.

    A query sees the keys from `start[query]` to itself: from where its window begins or, with a `reach`, that many,
    itself included. `start` never falls along the row, so the first query of a block sees furthest back and the last
    one least, and the blocks of keys that a block of queries sees follow from these two. Both lists of blocks are as
    wide as the row has blocks, however few are in them, so that no dimension of theirs is ever 0 or 1, which would
    compile anew.
    """
    from torch.nn.attention.flex_attention import BlockMask

    sizes = np.asarray(lengths, dtype=np.int32)
    start = np.repeat(np.cumsum(sizes, dtype=np.int32) - sizes, sizes)
    if reach is not None:
        start = np.maximum(start, np.arange(len(start), dtype=np.int32) - np.int32(reach - 1))
    begins, *blocks = (send(torch.from_numpy(part), device) for part in (start, *_blocks(start)))
    part_count, part, whole_count, whole = (block[None, None] for block in blocks)  # for all batches and heads

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= begins[query])

    return BlockMask.from_kv_blocks(
        part_count, part, whole_count, whole, BLOCK, visible, (len(start), len(start)),
        compute_q_blocks=False,  # for the backward pass
    )  # fmt: skip


def kernel_options(shared: int, width: int, itemsize: int) -> dict[str, int] | None:
    """FlexAttention's block sizes for heads of this `width` where a block may use `shared` bytes of shared memory.

    None where torch's own choice fits. That is made for the A100 (163 kB) and used from compute capability 8.0 on,
    where an RTX 3090, A10 or L4 (8.6, 8.9) has 99 kB. Fewer stages first, then smaller blocks: for heads of 256 in
    bfloat16 this gives what torch chooses for compute capability 12.0, which has 99 kB too.
    """
    hopper = shared >= 227 * 1024
    rows, columns, stages = _torch_choice(hopper, width, itemsize)
    if _needed(hopper, rows, columns, stages, width, itemsize) <= shared:
        return None
    while _needed(hopper, rows, columns, stages, width, itemsize) > shared and max(rows, columns) > 16:
        if stages > 2:
            stages -= 1
        elif rows >= columns:
            rows //= 2
        else:
            columns //= 2
    return {"BLOCK_M": rows, "BLOCK_N": columns, "num_stages": stages}


@contextmanager
def compiler_settings() -> Iterator[None]:
    """A context for a forward pass that may compile, in whichever thread (torch's settings are a thread's own).

    Floats are constants of a kernel: FlexAttention takes its scale and cap only as such. Dimensions that happen to be
    equal when something is compiled, such as blocks and heads, are not taken for one. 40 us, so once a pass.
    """
    compiler, shapes = _patches()
    with compiler, shapes:
        yield


def compiler_failure(error: BaseException) -> str | None:
    """What a compiler could not do, such as "InductorError: ..."; None for all other errors.

    Memory that is lacking while something is compiled is one of the others: with a smaller batch it may be there.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, torch.OutOfMemoryError | MemoryError) for cause in causes):
        return None
    if any("CUDA out of memory" in str(cause) for cause in causes):  # as text, from a process that compiles
        return None
    for cause in causes:
        package = type(cause).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
        # Triton calls the C compiler for its launcher, perhaps as late as at the first launch.
        if package or isinstance(cause, subprocess.CalledProcessError) or "C compiler" in str(cause):
            line = next(iter(str(error).strip().splitlines()), "")
            return f"{type(error).__name__}: {line}"[:300]
    return None


def _blocks(start: NDArray[np.int32]) -> tuple[NDArray[np.int32], ...]:
    """[blocks] and [blocks, blocks], twice, int32: how many and which blocks of keys a block of queries sees in part,
    then those that all its queries see whole. Beyond the count stands any block."""
    row = np.arange(-(-len(start) // BLOCK), dtype=np.int32)
    first, last = start[row * BLOCK], start[np.minimum(row * BLOCK + BLOCK, len(start)) - 1]
    seen = first // BLOCK
    whole = np.minimum(-(-last // BLOCK), row)  # whole to row - 1 are seen whole; row holds the diagonal
    in_part = np.where(row < (whole - seen)[:, None], seen[:, None] + row, row[:, None])
    return whole - seen + 1, in_part, row - whole, np.minimum(whole[:, None] + row, row[:, None])


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # A graph break or too many compilations raise, where they would otherwise compute all pairs of tokens in silence.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@lru_cache(maxsize=8)
def _flex_score(softcap: float) -> Callable[..., Tensor]:
    return partial(_capped, softcap)


def _capped(softcap: float, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return softcap * torch.tanh(score / softcap)


@lru_cache(maxsize=8)
def _options_here(device: torch.device, width: int, itemsize: int) -> dict[str, int] | None:
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return kernel_options(shared, width, itemsize) if shared is not None else None  # AMD's do not say


def _torch_choice(hopper: bool, width: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and num_stages as torch 2.13 chooses them: CUDAConfigHeuristic.get_flex_attn_fwd_configs in
    torch/_inductor/template_heuristics/triton.py, by item size and width; the second table is for all from 8.0 on that
    have none of their own."""
    if hopper:
        table = {(2, 64): (128, 128, 3), (2, 128): (128, 64, 3), (2, 256): (64, 32, 3), (4, 64): (128, 32, 3),
                 (4, 128): (32, 64, 3), (4, 192): (32, 64, 1), (4, 256): (32, 32, 3)}  # fmt: skip
    else:
        table = {(2, 64): (128, 64, 3), (2, 128): (128, 64, 3), (2, 192): (128, 32, 2), (2, 256): (32, 64, 3),
                 (4, 64): (128, 32, 3), (4, 128): (128, 32, 3), (4, 256): (64, 16, 3)}  # fmt: skip
    wide = (32, 16, 3) if itemsize == 4 else (64, 32, 3)
    return table.get((itemsize, width), (64, 64, 3) if width <= 256 else wide)


def _needed(hopper: bool, rows: int, columns: int, stages: int, width: int, itemsize: int) -> int:
    """Bytes of shared memory of a block: queries, the keys and values of some stages and, where threads exchange them,
    the scores. Fitted to what Triton 3.7 says when it compiles the kernel for 8.0, 8.6 and 9.0, which needs no GPU."""
    row = itemsize * (1 << (width - 1).bit_length())  # the kernel rounds the width up to a power of two
    if hopper and itemsize == 2:  # products that run on while the next stage is loaded, their scores in registers
        return rows * row + 2 * stages * columns * row
    if itemsize == 4:
        scores = rows * (columns + 1) * itemsize
    else:
        scores = 0 if rows >= 128 and columns >= 64 else rows * columns * itemsize
    return rows * row + 2 * max(1, stages - 1) * columns * row + scores


@lru_cache(maxsize=1)
def _patches() -> tuple[Any, Any]:
    """torch's settings while something compiles. Made once: every new patch would leave a variable of its own behind in
    each thread that it was used in."""
    import torch._dynamo
    from torch.fx.experimental import _config

    settings = {"specialize_float": True, "recompile_limit": MOST_KERNELS}
    return torch._dynamo.config.patch(settings), _config.patch({"use_duck_shape": False})  # type: ignore[attr-defined]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and the errors that it came from."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        cause = left.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            left += [cause.__cause__, cause.__context__, getattr(cause, "inner_exception", None)]
