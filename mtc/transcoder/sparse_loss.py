"""The training loss of mtc.transcoder.objective and its gradients from the chosen entries alone.

One product of [tokens, d] x [d, features], for z; then only the chosen entries (about 1 % of z) are touched; which they
are, and what their activations a are, says the activation function (mtc.transcoder.activations). Per token
the residuals R_p follow from one decode, cut at the prefix borders and accumulated. With
H_p = 2 sum over q >= p of w_q R_q,

    dL/da[t, j]     = H_group(j)[t] . W_dec[j]             at chosen entries only
    dL/dW_dec[j]    = sum over chosen t of a[t, j] H_group(j)[t]
    dL/dW_enc[j]    = sum over chosen t of dL/da[t, j] x[t]

AuxK is one more slot behind the prefixes: its entries are each token's strongest dead features, its residual starts
from the last prefix's, and its H flows to its own entries alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mtc.transcoder import native
from mtc.transcoder.activations import ACTIVATIONS, Activated, Activation
from mtc.transcoder.distributed import all_reduce
from mtc.transcoder.objective import LossOutput, Objective, PerToken, Weights, scaled_targets
from mtc.transcoder.pre_activations import pre_activations
from mtc.transcoder.products import Bags, Workspace, bag_sums, entry_dots, make_bags
from mtc.transcoder.selection import Chosen, among_ranks


class Entries(NamedTuple):
    """Chosen entries of z, ordered by token, then slot (prefix group, AuxK last), then feature."""

    token: Tensor
    """[entries] int64, token of each entry."""
    feature: Tensor
    """[entries] int64, feature of each entry."""
    slot: Tensor
    """[entries] int64: token * slots + slot, non-decreasing."""
    slots: Bags
    """Bags of the entries of each token's slot, tokens * slots of them."""
    by_feature: Tensor
    """[entries] int64, the order that sorts entries by feature."""
    features: Bags
    """Bags of the entries of each feature, in the order `by_feature`."""


def sparse_loss(
    x: Tensor,
    y: Tensor,
    weights: Weights,
    objective: Objective,
    workspace: Workspace,
    bfloat16_product: bool = False,
    per_token: PerToken | None = None,
) -> LossOutput:
    """The same numbers as `dense_loss` gives, up to rounding, with gradients computed from the chosen entries.

    `bfloat16_product` finds the entries by a bfloat16 product and computes their values again in x's dtype. Raises
    ValueError for another number of weights than of prefixes.
    """
    aux = objective.num_dead > 0
    slots = len(objective.ends) + aux
    if len(objective.weights) != len(objective.ends):
        raise ValueError(f"{len(objective.weights)} weights for {len(objective.ends)} prefixes")
    activation = ACTIVATIONS[objective.activation]
    with torch.no_grad():
        before = pre_activations(x, weights, workspace, bfloat16_product)
        token, feature, value = activation.choose(before, objective, workspace)
        given, active = value != 0, activation.active(value, feature, weights)
        num_active = active.sum()
        fired = torch.zeros_like(weights.b_enc).index_add_(0, feature, active.to(value.dtype)) > 0
        # Of the sums only the sign is read, so it does not matter that a GPU adds in any order.
        # Numbers go to a GPU as arguments of its kernels: a small tensor made on the host would wait for the device.
        slot = token * slots + sum((feature >= end).long() for end in objective.ends[:-1])
        if aux:
            dead = _choose_dead(before.z, objective)
            if before.rounded:
                dead = dead._replace(value=before.exact(dead.token, dead.feature))
            slot, order = torch.cat([slot, dead.token * slots + slots - 1]).sort(stable=True)
            token, feature, value = (
                torch.cat(parts)[order] for parts in ((token, dead.token), (feature, dead.feature), (value, dead.value))
            )
            given = torch.cat([given, torch.ones_like(dead.value, dtype=torch.bool)])[order]
        workspace.give("z", before.z)
        # A token that is not finite has no entries: without this its NaN would go unnoticed.
        value = value + 0 * x.sum()
        entries = _arrange(token, feature, slot, slots, len(x), len(weights.b_enc))
    value = _EncodeChosen.apply(x, weights.W_enc, weights.b_enc, value, given, entries, workspace)
    value, penalty = _activate(activation, value, entries, slots if aux else None, len(x), weights, objective)
    if per_token is not None:
        value, y = value * per_token.scale[token], scaled_targets(y, weights.b_dec, per_token.scale)
    slot_weights = (*objective.weights, objective.aux_weight) if aux else objective.weights
    loss, errors = _NestedLoss.apply(
        value, weights.W_dec, weights.b_dec, y, entries, slot_weights, aux, workspace, objective.sharded
    )
    if penalty is not None:
        loss = loss + (penalty if per_token is None else penalty * per_token.scale).sum()
    aux_error = errors[:, -1].sum() if aux else errors.new_zeros(())
    errors = errors[:, : len(objective.ends)]
    if per_token is not None:
        errors = errors * per_token.counted[:, None]
    return LossOutput(loss, errors.sum(0), aux_error, num_active, fired)


def nested_residuals(
    value: Tensor, W_dec: Tensor, b_dec: Tensor, y: Tensor, entries: Entries, weights: tuple[float, ...], aux: bool,
    workspace: Workspace, sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """H [tokens, slots, d_target], dL/d value [entries] and each token's squared error of each slot [tokens, slots].

    With `sharded` the entries are this rank's part of those of the same tokens; H and the errors are of all, and equal
    on every rank.
    """
    tokens, slots = len(y), len(weights)
    prefixes = slots - aux
    if native.runs(W_dec) and not sharded:
        doubled = torch.tensor([2 * w for w in weights])
        H = workspace.take("H", (tokens * slots, W_dec.shape[1]), y).view(tokens, slots, W_dec.shape[1])
        d_value, errors = value.new_empty(len(value)), y.new_empty(tokens, slots)
        tables = (value, entries.feature, entries.slots.offsets, W_dec, b_dec, y.contiguous(), doubled)
        native.call("nested_pass", *tables, int(aux), H, d_value, errors, tokens, slots, W_dec.shape[1])
        return H, d_value, errors
    H = bag_sums(W_dec, entries.feature, value, entries.slots, workspace, "H").view(tokens, slots, W_dec.shape[1])
    if sharded:
        all_reduce(H)
    H[:, 0] += b_dec - y
    for slot in range(1, slots):
        H[:, slot] += H[:, slot - 1]  # residuals R of each prefix, and of AuxK behind the last
    errors = H.square().sum(2)
    for slot in range(slots - 1, -1, -1):
        H[:, slot] *= 2 * weights[slot]
        if slot < prefixes - 1:
            H[:, slot] += H[:, slot + 1]
    return H, entry_dots(H.flatten(0, 1), entries.slot, W_dec, entries.feature), errors


def _activate(
    activation: Activation, value: Tensor, entries: Entries, slots: int | None, tokens: int, weights: Weights,
    objective: Objective,
) -> Activated:  # fmt: skip
    """Activations of the chosen entries; those of AuxK, in the last of `slots` if that is given, stay as they are."""
    token, feature = entries.token, entries.feature
    if slots is None or activation.thresholds != "trained":  # the others change no value
        return activation.sparse(value, token, feature, tokens, weights, objective)
    is_aux = entries.slot % slots == slots - 1
    (chosen,) = (~is_aux).nonzero(as_tuple=True)
    found = activation.sparse(value[chosen], token[chosen], feature[chosen], tokens, weights, objective)
    return found._replace(value=value.index_put((chosen,), found.value))


def _choose_dead(z: Tensor, objective: Objective) -> Chosen:
    """Entries of each token's strongest dead features, with `sharded` this rank's part of them; values may be
    negative."""
    strongest = z[:, objective.dead].topk(min(objective.aux_k, len(objective.dead)), dim=1)
    column, order = strongest.indices.sort(dim=1)
    token = torch.arange(len(z), device=z.device).repeat_interleave(column.shape[1])
    value = strongest.values.gather(1, order)
    chosen = Chosen(token, objective.dead[column.flatten()], value.flatten())
    if not objective.sharded:
        return chosen
    keep = among_ranks(value, min(objective.aux_k, objective.num_dead)).flatten()
    return Chosen(*(part[keep] for part in chosen))


def _arrange(token: Tensor, feature: Tensor, slot: Tensor, slots: int, tokens: int, features: int) -> Entries:
    """Entries with their orders; `slot` [entries] as in Entries, non-decreasing."""
    by_feature = feature.argsort(stable=True)
    by_slot, of_feature = (
        make_bags(_offsets(index, size), len(token)) for index, size in ((slot, tokens * slots), (feature, features))
    )
    return Entries(token, feature, slot, by_slot, by_feature, of_feature)


def _offsets(index: Tensor, size: int) -> Tensor:
    """[size + 1] int64: how many of `index` are less than each number."""
    counts = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
    counts[1:].scatter_add_(0, index, torch.ones_like(index))
    return counts.cumsum(0)


class _EncodeChosen(Function):
    """Values of the chosen entries, x[t] . W_enc[j] + b_enc[j], which are known already; adds their gradients, where
    `given` [entries]: the others only fill up the shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, value: Tensor, given: Tensor, entries: Entries,
        workspace: Workspace,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, W_enc, given)
        ctx.entries, ctx.workspace = entries, workspace
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, given = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = torch.where(given, gradient, 0.0)
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
        aux: bool, workspace: Workspace, sharded: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, d_value, errors = nested_residuals(value, W_dec, b_dec, y, entries, weights, aux, workspace, sharded)
        ctx.save_for_backward(value, H, d_value)
        ctx.entries, ctx.workspace = entries, workspace
        ctx.mark_non_differentiable(errors)
        return torch.stack([w * e for w, e in zip(weights, errors.sum(0), strict=True)]).sum(), errors

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
            workspace.give("H", H.flatten(0, 1))
        return gradient * d_value, d_W, d_b, d_y if ctx.needs_input_grad[3] else None, None, None, None, None, None
