"""The training loss of a Matryoshka transcoder and its gradients, twice: dense, and sparse after the selection.

    z     = ReLU(x W_enc^T + b_enc)                        [tokens, features]
    a     = BatchTopK(z)                                   k entries per token on average
    R_p   = b_dec + sum over groups g <= p of a_g W_dec_g - y     residual of prefix p, [tokens, d_target]
    loss  = sum over p of w_p ||R_p||^2  +  w_aux ||stop(R_last) + a_dead W_dec_dead||^2

`dense_loss` writes this down and lets autograd differentiate: five products of [tokens, d] x [d, features].
`sparse_loss` makes one such product, for z, and then touches only the chosen entries (about 1 % of z). Per token the
residuals follow from one decode, cut at the prefix borders and accumulated. With H_p = 2 sum over q >= p of w_q R_q,

    dL/da[t, j]     = H_group(j)[t] . W_dec[j]             at chosen entries only
    dL/dW_dec[j]    = sum over chosen t of a[t, j] H_group(j)[t]
    dL/dW_enc[j]    = sum over chosen t of dL/da[t, j] x[t]

AuxK (Gao et al. 2024, arXiv:2406.04093) is one more slot behind the prefixes: its entries are each token's strongest
dead features, its residual starts from the last prefix's, and its H flows to its own entries alone. Its values are
those before the ReLU, since a feature that is negative on every token gets no gradient through one and stays dead.
On CPUs the loops run compiled (kernels.c) for float32; everywhere else as torch operations, the same on CPU and GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, linear

from mtc import native
from mtc.devices import is_gpu
from mtc.selection import Chosen, keep_largest, largest_entries

LONGEST_PIECE = 64
"""Entries that a GPU sums one after another."""
REFINE = 1.1
"""How many times the wanted entries the bfloat16 product proposes; their values, computed again, decide."""


class Objective(NamedTuple):
    """What the loss is made of at one step, equal on all ranks."""

    ends: tuple[int, ...]
    """One past the last feature of each prefix, increasing; the last is the whole dictionary."""
    weights: tuple[float, ...]
    """Weight of each prefix's squared error, summed over tokens and dimensions."""
    num_entries: int
    """Entries to choose, over all ranks: k * tokens."""
    dead: Tensor
    """[dead features] int64, sorted: the features that AuxK may use."""
    aux_k: int
    """Dead features per token that reconstruct the residual."""
    aux_weight: float
    """Weight of AuxK's squared error."""


class LossOutput(NamedTuple):
    loss: Tensor
    """Scalar, this rank's part of the weighted sum; differentiable."""
    errors: Tensor
    """[prefixes], squared error summed over this rank's tokens and dimensions."""
    aux_error: Tensor
    """Scalar, the same for AuxK; 0 without dead features."""
    num_active: Tensor
    """Scalar, chosen entries of this rank."""
    fired: Tensor
    """[features], bool: chosen at least once on this rank."""


class Weights(NamedTuple):
    W_enc: Tensor
    """[features, d_source]"""
    b_enc: Tensor
    """[features]"""
    W_dec: Tensor
    """[features, d_target]"""
    b_dec: Tensor
    """[d_target]"""


class Workspace:
    """Memory that is written again at every step: on a CPU, fresh pages cost more than the sums that fill them."""

    def __init__(self) -> None:
        self.border: float = 0.0
        """Smallest entry chosen at the last step, a hint for `largest_entries`."""
        self._free: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of `like`'s dtype and device; the caller's until it is given back."""
        found = self._free.pop(name, None)
        if found is not None and found.shape == shape and found.dtype == like.dtype and found.device == like.device:
            return found
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, name: str, tensor: Tensor) -> None:
        if not is_gpu(tensor.device):  # there the allocator keeps memory anyway
            self._free[name] = tensor


# Dense: the reference, and the faster choice where products are cheap -----------------------------------------------


def dense_loss(x: Tensor, y: Tensor, weights: Weights, objective: Objective) -> LossOutput:
    """The loss by dense products and autograd. x [tokens, d_source] normalised, y [tokens, d_target] scaled."""
    before = linear(x, weights.W_enc, weights.b_enc)
    z = torch.relu(before)
    keep, _ = keep_largest(z.detach().float().flatten(), objective.num_entries)
    keep = keep.view_as(z)
    a = z * keep
    residual, errors, start = weights.b_dec - y, [], 0
    for end in objective.ends:
        residual = residual + a[:, start:end] @ weights.W_dec[start:end]
        errors.append(residual.square().sum())
        start = end
    loss = sum(w * e for w, e in zip(objective.weights, errors, strict=True))
    aux_error = y.new_zeros(())
    if len(objective.dead):
        candidates = before[:, objective.dead]
        strongest = candidates.topk(min(objective.aux_k, len(objective.dead)), dim=1)
        a_dead = torch.zeros_like(candidates).scatter(1, strongest.indices, strongest.values)
        aux_error = (residual.detach() + a_dead @ weights.W_dec[objective.dead]).square().sum()
        loss = loss + objective.aux_weight * aux_error
    return LossOutput(loss, torch.stack(errors).detach(), aux_error.detach(), keep.sum(), keep.any(0))  # type: ignore[arg-type]


# Sparse -------------------------------------------------------------------------------------------------------------


class Bags(NamedTuple):
    """Consecutive entries in bags, each to be summed."""

    offsets: Tensor
    """[bags + 1] int64: where each bag's entries begin; the last is how many entries there are."""
    pieces: Tensor | None = None
    """[pieces + 1] int64, on a GPU: where parts of at most LONGEST_PIECE entries begin, empty ones at the end."""
    first: Tensor | None = None
    """[bags + 1] int64, on a GPU: the first piece of each bag."""


class Entries(NamedTuple):
    """Chosen entries of z, ordered by token, then slot (prefix group, AuxK last), then feature."""

    token: Tensor
    """[entries] int64"""
    feature: Tensor
    """[entries] int64"""
    slot: Tensor
    """[entries] int64: token * slots + slot, non-decreasing."""
    slots: Bags
    """One for each slot of each token, tokens * slots."""
    by_feature: Tensor
    """[entries]: the order that sorts entries by feature."""
    features: Bags
    """One for each feature, of the entries in that order."""


def sparse_loss(
    x: Tensor, y: Tensor, weights: Weights, objective: Objective, workspace: Workspace, bfloat16_product: bool = False
) -> LossOutput:
    """The same as `dense_loss`, up to rounding, with gradients computed from the chosen entries.

    `bfloat16_product` finds the entries by a bfloat16 product and computes their values again in x's dtype.
    """
    aux = len(objective.dead) > 0
    slots = len(objective.ends) + aux
    assert len(objective.weights) == len(objective.ends)
    with torch.no_grad():
        z = _product(x, weights, workspace, bfloat16_product)
        token, feature, value = _choose(z, x, weights, objective, workspace, bfloat16_product)
        active = value > 0
        num_active = active.sum()
        fired = torch.zeros_like(weights.b_enc).index_add_(0, feature, value) > 0
        # Of the sums only the sign is read, so it does not matter that a GPU adds in any order.
        # Numbers go to a GPU as arguments of its kernels: a small tensor made on the host would wait for the device.
        slot = token * slots + sum((feature >= end).long() for end in objective.ends[:-1])
        if aux:
            dead = _choose_dead(z, objective)
            if bfloat16_product:
                dead = dead._replace(value=_refine(x, weights, dead.token, dead.feature))
            slot, order = torch.cat([slot, dead.token * slots + slots - 1]).sort(stable=True)
            token, feature, value = (
                torch.cat(parts)[order] for parts in ((token, dead.token), (feature, dead.feature), (value, dead.value))
            )
            active = torch.cat([active, torch.ones_like(dead.value, dtype=torch.bool)])[order]
        workspace.give("z", z)
        # A token that is not finite has no entries: without this its NaN would go unnoticed.
        value = value + 0 * x.sum()
        entries = _arrange(token, feature, slot, slots, len(x), len(weights.b_enc))
    value = _EncodeChosen.apply(x, weights.W_enc, weights.b_enc, value, active, entries, workspace)
    slot_weights = (*objective.weights, objective.aux_weight) if aux else objective.weights
    loss, errors = _NestedLoss.apply(value, weights.W_dec, weights.b_dec, y, entries, slot_weights, aux, workspace)
    aux_error = errors[-1] if aux else errors.new_zeros(())
    return LossOutput(loss, errors[: len(objective.ends)], aux_error, num_active, fired)


class _EncodeChosen(Function):
    """Values of the chosen entries, x[t] . W_enc[j] + b_enc[j], which are known already; adds their gradients, where
    `active` [entries]: the others only fill up the shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, value: Tensor, active: Tensor, entries: Entries,
        workspace: Workspace,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, W_enc, active)
        ctx.entries, ctx.workspace = entries, workspace
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, active = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = torch.where(active, gradient, 0.0)
        order = entries.by_feature
        token, by_feature = entries.token[order], gradient[order]
        d_W = bag_sums(x, token, by_feature, entries.features, ctx.workspace, "W_enc")
        d_b = bag_sums(x.new_ones(len(x), 1), token, by_feature, entries.features).squeeze(1)  # in a fixed order
        d_x = None
        if ctx.needs_input_grad[0]:
            slots = (len(entries.slots.offsets) - 1) // len(x)
            tokens = make_bags(entries.slots.offsets[::slots].contiguous(), len(gradient))
            d_x = bag_sums(W_enc, entries.feature, gradient, tokens)
        return d_x, d_W, d_b, None, None, None, None


class _NestedLoss(Function):
    """Weighted squared error of every slot, with H computed on the way: forward does most of the backward's work."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, entries: Entries, weights: tuple[float, ...],
        aux: bool, workspace: Workspace,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, d_value, errors = nested_residuals(value, W_dec, b_dec, y, entries, weights, aux, workspace)
        ctx.save_for_backward(value, H, d_value)
        ctx.entries, ctx.workspace = entries, workspace
        ctx.mark_non_differentiable(errors)
        return torch.stack([w * e for w, e in zip(weights, errors, strict=True)]).sum(), errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        value, H, d_value = ctx.saved_tensors
        entries, workspace = ctx.entries, ctx.workspace
        order = entries.by_feature
        d_y = None
        if any(ctx.needs_input_grad[2:4]):
            d_y = -gradient * H[:, 0]  # every prefix holds b_dec - y, and H_0 sums over all of them
        bags = entries.slot[order], (gradient * value)[order], entries.features
        d_W = bag_sums(H.flatten(0, 1), *bags, workspace, "W_dec")
        d_b = None if d_y is None else -d_y.sum(0)
        if native.runs(H):
            workspace.give("H", H)
        return gradient * d_value, d_W, d_b, d_y if ctx.needs_input_grad[3] else None, None, None, None, None


# The loops: compiled on CPUs, torch elsewhere -----------------------------------------------------------------------


def make_bags(offsets: Tensor, entries: int) -> Bags:
    """Bags that begin at `offsets` [bags + 1], of so many entries in all; nothing waits for the host.

    A GPU walks through a piece one entry after another, so that a feature which fires on every token would hold up all
    others: long bags are cut. As many pieces are made as there can be, since their number is known to the device only.
    """
    if not is_gpu(offsets.device):
        return Bags(offsets)
    bags = len(offsets) - 1
    count = (offsets.diff() + LONGEST_PIECE - 1).div(LONGEST_PIECE, rounding_mode="floor")
    first = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    piece = torch.arange(bags + entries // LONGEST_PIECE, device=offsets.device)
    bag = torch.searchsorted(first[1:], piece, right=True).clamp(max=bags - 1)
    starts = offsets[bag] + (piece - first[bag]) * LONGEST_PIECE
    return Bags(offsets, torch.cat([torch.minimum(starts, offsets[bag + 1]), offsets[-1:]]), first)


def bag_sums(
    table: Tensor, index: Tensor, weight: Tensor, bags: Bags, workspace: Workspace | None = None, name: str = ""
) -> Tensor:
    """[bags, width]: sums of weight[e] * table[index[e]] over each bag's entries.

    Always in the same order, so the same to the last bit. Written into the workspace's memory of that name, if any,
    where the compiled loop runs.
    """
    if native.runs(table):
        shape = (len(bags.offsets) - 1, table.shape[1])
        out = table.new_empty(shape) if workspace is None else workspace.take(name, shape, table)
        native.call("bag_sums", table.contiguous(), index, weight, bags.offsets, out, *shape)
        return out
    offsets = bags.offsets if bags.pieces is None else bags.pieces
    sums = embedding_bag(index, table, offsets, per_sample_weights=weight, mode="sum", include_last_offset=True)
    if bags.first is None:
        return sums
    return torch.segment_reduce(sums, "sum", offsets=bags.first, axis=0, unsafe=True, initial=0)  # unsafe: no waiting


def entry_dots(left: Tensor, left_index: Tensor, right: Tensor, right_index: Tensor) -> Tensor:
    """[entries]: left[left_index[e]] . right[right_index[e]]; `left_index` is non-decreasing."""
    if native.runs(left):
        out = left.new_empty(len(left_index))
        native.call("entry_dots", left.contiguous(), left_index, right, right_index, out, len(out), left.shape[1])
        return out
    # What embedding_bag's own backward calls: the products are summed without being written down. It is private, and
    # reads rows as if they were contiguous.
    assert all(t.is_contiguous() for t in (left, left_index, right, right_index))
    offsets = torch.searchsorted(left_index, torch.arange(len(left), device=left.device))
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, right_index, offsets, left_index, 0)


def nested_residuals(
    value: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, entries: Entries, weights: tuple[float, ...], aux: bool,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """H [tokens, slots, d_target], dL/d value [entries] and the squared error of each slot [slots]."""
    tokens, slots = len(y), len(weights)
    prefixes = slots - aux
    if native.runs(W_dec):
        doubled = torch.tensor([2 * w for w in weights])
        H = workspace.take("H", (tokens, slots, W_dec.shape[1]), y)
        d_value, errors = value.new_empty(len(value)), y.new_empty(tokens, slots)
        tables = (value, entries.feature, entries.slots.offsets, W_dec, b_dec, y.contiguous(), doubled)
        native.call("nested_pass", *tables, int(aux), H, d_value, errors, tokens, slots, W_dec.shape[1])
        return H, d_value, errors.sum(0)
    H = bag_sums(W_dec, entries.feature, value, entries.slots).view(tokens, slots, W_dec.shape[1])
    H[:, 0] += b_dec - y
    for slot in range(1, slots):
        H[:, slot] += H[:, slot - 1]  # residuals R of each prefix, and of AuxK behind the last
    errors = H.square().sum((0, 2))
    for slot in range(slots - 1, -1, -1):
        H[:, slot] *= 2 * weights[slot]
        if slot < prefixes - 1:
            H[:, slot] += H[:, slot + 1]
    return H, entry_dots(H.flatten(0, 1), entries.slot, W_dec, entries.feature), errors


# Choosing entries ---------------------------------------------------------------------------------------------------


def _product(x: Tensor, weights: Weights, workspace: Workspace, bfloat16_product: bool) -> Tensor:
    """x W_enc^T + b_enc, [tokens, features], in x's dtype; its values are bfloat16's if the product was."""
    if bfloat16_product and x.device.type != "cpu":  # where the sums of products need not be rounded to bfloat16 again
        return torch.mm(x.bfloat16(), weights.W_enc.bfloat16().t(), out_dtype=x.dtype).add_(weights.b_enc)
    z = workspace.take("z", (len(x), len(weights.b_enc)), x)
    if bfloat16_product:
        return z.copy_(linear(x.bfloat16(), weights.W_enc.bfloat16(), weights.b_enc.bfloat16()))
    return torch.addmm(weights.b_enc, x, weights.W_enc.t(), out=z)


def _choose(
    z: Tensor, x: Tensor, weights: Weights, objective: Objective, workspace: Workspace, bfloat16_product: bool
) -> Chosen:
    """The global batch's largest positive entries."""
    count = objective.num_entries
    if not bfloat16_product:
        chosen, workspace.border = largest_entries(z, count, workspace.border)
        return chosen
    proposed, workspace.border = largest_entries(z, round(count * REFINE), workspace.border)
    value = torch.where(proposed.value > 0, _refine(x, weights, proposed.token, proposed.feature).relu(), 0.0)
    keep, _ = keep_largest(value.float(), count)
    if is_gpu(z.device):  # shapes that depend on values would wait for the host; zeros add nothing
        return proposed._replace(value=torch.where(keep, value, 0.0))
    return Chosen(proposed.token[keep], proposed.feature[keep], value[keep])


def _choose_dead(z: Tensor, objective: Objective) -> Chosen:
    """Each token's strongest dead features; values may be negative."""
    strongest = z[:, objective.dead].topk(min(objective.aux_k, len(objective.dead)), dim=1)
    column, order = strongest.indices.sort(dim=1)
    token = torch.arange(len(z), device=z.device).repeat_interleave(column.shape[1])
    return Chosen(token, objective.dead[column.flatten()], strongest.values.gather(1, order).flatten())


def _refine(x: Tensor, weights: Weights, token: Tensor, feature: Tensor) -> Tensor:
    """x W_enc^T + b_enc at some entries, in x's dtype."""
    return entry_dots(x, token, weights.W_enc, feature) + weights.b_enc[feature]


def _arrange(token: Tensor, feature: Tensor, slot: Tensor, slots: int, tokens: int, features: int) -> Entries:
    """Entries with their orders; `slot` [entries] as in Entries, non-decreasing."""
    by_feature = feature.argsort(stable=True)
    by_slot, of_feature = (
        make_bags(_offsets(index, size), len(token)) for index, size in ((slot, tokens * slots), (feature, features))
    )
    return Entries(token, feature, slot, by_slot, by_feature, of_feature)


def _offsets(index: Tensor, size: int) -> Tensor:
    """[size + 1]: how many of `index` are less than each number."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
    counts[1:].scatter_add_(0, index, torch.ones_like(index))
    return counts.cumsum(0)
