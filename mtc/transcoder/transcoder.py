"""The Matryoshka transcoder: a sparse one-hidden-layer network whose dictionary is nested in prefixes.

    z   = ReLU(norm(x) W_enc^T + b_enc)                    pre-activations of all F features
    a   = z where the activation function has z active     BatchTopK: among the k * B largest of the global batch
                                                           (training), above the threshold (inference)
    y_m = sum over features j < m of a_j W_dec[j] + b_dec  one per prefix m; with `skip`, + W_skip norm(x)

Activation functions: mtc.transcoder.activations. Matryoshka dictionaries: Bussmann et al. 2025, arXiv:2503.17547.
Transcoders: Dunefsky et al. 2024, arXiv:2406.11944. AuxK: Gao et al. 2024, arXiv:2406.04093.
Callers always pass and get raw activations; the scaling of inputs and targets lives in the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from mtc.devices import is_gpu
from mtc.transcoder.activations import ACTIVATIONS, Activation
from mtc.transcoder.dense_loss import dense_loss
from mtc.transcoder.distributed import agree, all_reduce
from mtc.transcoder.massive import above, cap, massive_norm
from mtc.transcoder.objective import Objective, PerToken, Weights
from mtc.transcoder.products import Workspace, bag_sums, entry_dots, make_bags
from mtc.transcoder.selection import largest_of_each
from mtc.transcoder.shape import TranscoderShape
from mtc.transcoder.shard import BY_FEATURE, Shard
from mtc.transcoder.sparse_loss import sparse_loss
from mtc.transcoder.starts import distinct, draw_distinct, normal_rows, unit

FORMAT_VERSION = 2
READABLE = ("1", "2")
"""Versions of weights files that are read; those of version 1 do not tell massive tokens."""
RMS_EPS = 1e-6
TOKENS_AT_ONCE = 64
"""Whose activations of all features `encode_some` has in memory, where features compete."""


class Codes(NamedTuple):
    """Sparse feature activations of some tokens, token by token, features ascending within each."""

    tokens: int
    """Tokens that were encoded, whether or not a feature is active."""
    token: Tensor
    """[entries] int64, non-decreasing: token of each active feature."""
    feature: Tensor
    """[entries] int64, index of each active feature."""
    value: Tensor
    """[entries] float32, activation of each active feature, above 0."""


class Compute(NamedTuple):
    """How the training loss is computed; see `mtc.transcoder.dense_loss` and `mtc.transcoder.sparse_loss`."""

    backend: Literal["dense", "sparse"] = "dense"
    bfloat16: bool = False
    """Whether products run in bfloat16: with the dense backend all of them, with the sparse one the encoder's, whose
    chosen values are computed again in float32."""


class TrainOutput(NamedTuple):
    """Result of a training forward pass over this rank's share of the batch."""

    loss: Tensor
    """Scalar, this rank's part of the training loss; differentiable."""
    errors: Tensor
    """[prefixes], squared error of each prefix in scaled units, summed over dimensions and this rank's tokens that are
    not massive."""
    aux_error: Tensor
    """Scalar, squared error of AuxK in scaled units, summed over this rank's tokens and dimensions; 0 without dead
    features."""
    num_active: Tensor
    """Scalar, entries of this rank that were chosen."""
    fired: Tensor
    """[features] bool: the feature was chosen at least once on this rank."""
    counted: Tensor
    """Scalar, this rank's tokens that are not massive."""
    target_sum: Tensor
    """[d_target], scaled targets summed over tokens that are not massive."""
    target_square: Tensor
    """Scalar, squares of scaled targets summed over dimensions and tokens that are not massive."""


class MatryoshkaTranscoder(nn.Module):
    """Weights W_enc [features, d_source], b_enc [features], W_dec [features, d_target], b_dec [d_target], float32, and
    with `shape.skip` W_skip [d_target, d_source] (Paulo et al. 2025, arXiv:2501.18823).

    Buffers: `input_scale` and `target_scale` (scalars that multiply sources and targets), `threshold` (scalar, or
    [features] with one for each; NaN until calibrated, 0 for TopK, a parameter where it is trained), `massive_norm`
    (scalar, the raw target's norm above which a token is massive; NaN where it is not known) and `tokens_since_fired`
    [features], int64.
    """

    input_scale: Tensor
    target_scale: Tensor
    threshold: Tensor
    massive_norm: Tensor
    tokens_since_fired: Tensor

    def __init__(self, shape: TranscoderShape, seed: int = 0, shard: Shard | None = None):
        """With `shard`, that rank's features of the transcoder of this shape: a transcoder of them in all but its file,
        whose `shape`, groups and prefixes count them alone."""
        super().__init__()
        total = sum(shape.group_sizes)
        self.shape = shape if shard is None else shape._replace(group_sizes=shard.sizes)
        self.shard = shard
        features = sum(self.shape.group_sizes)
        generator = torch.Generator().manual_seed(seed)
        f32 = torch.float32  # not the default, which transformers changes while another thread loads a model
        encoder = normal_rows(total, shape.d_source, generator, None if shard is None else shard.places)
        self.W_enc = nn.Parameter(encoder / encoder.norm(dim=1, keepdim=True))
        self.b_enc = nn.Parameter(torch.zeros(features, dtype=f32))
        # A decoder that starts at zero lets each feature take its direction from the first residuals it sees.
        self.W_dec = nn.Parameter(torch.zeros(features, shape.d_target, dtype=f32))
        self.b_dec = nn.Parameter(torch.zeros(shape.d_target, dtype=f32))
        self.W_skip = nn.Parameter(torch.zeros(shape.d_target, shape.d_source, dtype=f32)) if shape.skip else None
        self.register_buffer("input_scale", torch.ones((), dtype=f32))
        self.register_buffer("target_scale", torch.ones((), dtype=f32))
        if self.activation.thresholds == "trained":
            self.threshold = nn.Parameter(torch.full((features,), float("nan"), dtype=f32))
        else:
            start = 0.0 if self.activation.thresholds == "none" else float("nan")
            self.register_buffer("threshold", torch.full((), start, dtype=f32))
        self.register_buffer("massive_norm", torch.full((), float("nan"), dtype=f32))
        self.register_buffer("tokens_since_fired", torch.zeros(features, dtype=torch.int64))

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.shape.activation]

    @property
    def num_features(self) -> int:
        return self.W_enc.shape[0]

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(end for _, end in self.groups)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and one-past-last feature of each group of the nested dictionary."""
        ends = [0]
        for size in self.shape.group_sizes:
            ends.append(ends[-1] + size)
        return list(pairwise(ends))

    # Inference ------------------------------------------------------------------------------------------------------

    def encode(self, source: Tensor, prefix: int | None = None) -> Tensor:
        """Feature activations of raw source activations: [tokens, d_source] -> [tokens, prefix or features].

        Raises ValueError if the threshold was never calibrated or `prefix` is not one of `prefixes`.
        """
        self._check_calibrated()
        m = self._check_prefix(prefix)
        if self.activation.thresholds == "none":
            z = self.pre_activations(source)
            chosen = largest_of_each(z.detach(), self.shape.k, self.rank_scale())
            return z[:, :m] * torch.zeros_like(z).index_put((chosen.token, chosen.feature), chosen.value)[:, :m].gt(0)
        z = self.pre_activations(source, m)
        return z * (z > (self.threshold[:prefix] if self.threshold.dim() else self.threshold))

    @torch.no_grad()
    def encode_some(self, source: Tensor, features: Sequence[int]) -> Tensor:
        """The columns of `encode(source)` for some features, [tokens, features], which cost no more than these, unless
        all compete; raises ValueError as that does."""
        self._check_calibrated()
        if self.activation.thresholds == "none":
            index = torch.tensor(features, device=source.device)
            return torch.cat([self.encode(some)[:, index] for some in source.split(TOKENS_AT_ONCE)])
        index = torch.tensor(features, device=self.W_enc.device)
        z = torch.relu(torch.nn.functional.linear(self.normalise(source), self.W_enc[index], self.b_enc[index]).float())
        return z * (z > (self.threshold[index] if self.threshold.dim() else self.threshold))

    def decode(self, activations: Tensor, source: Tensor | None = None) -> Tensor:
        """Raw reconstruction from activations of all features or of one prefix: [tokens, m] -> [tokens, d_target].

        A transcoder with a skip connection needs the raw `source` [tokens, d_source] too; raises ValueError without.
        """
        m = self._check_prefix(activations.shape[-1])
        return (activations @ self.W_dec[:m] + self.base(source)) / self.target_scale

    @torch.no_grad()
    def encode_sparse(self, source: Tensor, bfloat16_search: bool = False, prefix: int | None = None) -> Codes:
        """The features that are not zero in `encode(source, prefix)`; raises ValueError as that does.

        `bfloat16_search` proposes entries by a product in bfloat16, which some CPUs multiply many times faster, with as
        much room below the threshold as rounding can take; their float32 values decide.
        """
        self._check_calibrated()
        m = self._check_prefix(prefix)
        if self.activation.thresholds == "none":  # features of one token compete, also with those beyond the prefix
            chosen = largest_of_each(self.pre_activations(source), self.shape.k, self.rank_scale())
            kept = (chosen.feature < m) & (chosen.value > 0)
            return Codes(len(source), *(part[kept] for part in chosen))
        x, threshold, W_enc, b_enc = self.normalise(source), self.threshold.clamp(min=0), self.W_enc[:m], self.b_enc[:m]
        if threshold.dim():
            threshold = threshold[:m]
        if not bfloat16_search:
            z = torch.nn.functional.linear(x, W_enc, b_enc).float()
            token, feature = (index.contiguous() for index in (z > threshold).nonzero(as_tuple=True))
            return Codes(len(source), token, feature, z[token, feature])
        z = torch.nn.functional.linear(x.bfloat16(), W_enc.bfloat16())
        # Both factors and the result are rounded by at most 2^-9 of themselves, and |x . w| <= ||x|| ||w||; so is the
        # border.
        largest = x.norm(dim=1).amax() if len(x) else x.new_zeros(())
        border = threshold - b_enc - 2**-7 * largest * W_enc.norm(dim=1)
        found = (z > (border - 2**-8 * border.abs()).bfloat16()).nonzero(as_tuple=True)
        token, feature = (index.contiguous() for index in found)
        value = entry_dots(x, token, W_enc, feature) + b_enc[feature]
        fires = value > (threshold[feature] if threshold.dim() else threshold)
        return Codes(len(source), token[fires], feature[fires], value[fires])

    @torch.no_grad()
    def decode_codes(self, codes: Codes, source: Tensor | None = None) -> Tensor:
        """Raw reconstruction of every prefix, [prefixes, tokens, d_target]; as `decode` of each, but only
        active features cost anything."""
        groups = len(self.groups)
        ends = torch.tensor(self.prefixes, device=codes.feature.device)
        bag = codes.token * groups + torch.bucketize(codes.feature, ends, right=True)
        counts = torch.bincount(bag, minlength=codes.tokens * groups)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        bags = make_bags(offsets, len(codes.feature))
        parts = bag_sums(self.W_dec, codes.feature, codes.value, bags).view(codes.tokens, groups, self.shape.d_target)
        return (parts.transpose(0, 1).cumsum(0) + self.base(source)) / self.target_scale

    def reconstruct(self, source: Tensor, prefix: int | None = None) -> Tensor:
        return self.decode(self.encode(source, prefix), source)

    def pre_activations(self, source: Tensor, prefix: int | None = None) -> Tensor:
        """z = ReLU(norm(x) W_enc^T + b_enc), float32, [tokens, prefix or features]."""
        x = self.normalise(source)
        return torch.relu(torch.nn.functional.linear(x, self.W_enc[:prefix], self.b_enc[:prefix]).float())

    def rank_scale(self) -> Tensor | None:
        """[features], what z is multiplied with where entries compete, without gradients; None for 1."""
        return self.W_dec.detach().norm(dim=1) if self.shape.rank == "contribution" else None

    def normalise(self, source: Tensor) -> Tensor:
        """Scale raw sources: `rms` divides each token by its root mean square, `scalar` is one number."""
        x = source.float()
        factor = self.input_factor(x)
        return x if factor is None else x * factor

    def input_factor(self, source: Tensor) -> Tensor | None:
        """What `normalise` multiplies sources [tokens, d_source] with, in their dtype: [tokens, 1] or a scalar; None
        for 1."""
        if self.shape.input_norm == "rms":
            length = torch.linalg.vector_norm(source, dim=-1, keepdim=True)
            return torch.rsqrt(length.square() / source.shape[-1] + RMS_EPS)
        return self.input_scale.to(source.dtype) if self.shape.input_norm == "scalar" else None

    @torch.no_grad()
    def massive(self, target: Tensor) -> Tensor:
        """[tokens] bool: which raw targets [tokens, d_target] are of massive tokens (mtc.transcoder.massive); none
        where `massive_norm` is not known."""
        return above(target, self.massive_norm)

    def base(self, source: Tensor | None) -> Tensor:
        """The part of a reconstruction that is no feature's, scaled: [d_target], with a skip [tokens, d_target]."""
        if self.W_skip is None:
            return self.b_dec
        if source is None:
            raise ValueError("this transcoder has a skip connection: decoding needs the source activations too")
        return torch.nn.functional.linear(self.normalise(source), self.W_skip, self.b_dec)

    # Training -------------------------------------------------------------------------------------------------------

    def forward(
        self, source: Tensor, target: Tensor, objective: Objective, compute: Compute, workspace: Workspace
    ) -> TrainOutput:
        """Training loss of raw activations [tokens, d_source] and [tokens, d_target].

        `objective` is equal on all ranks. Called on every rank at once when torch.distributed is set up.
        """
        rounded = torch.autocast(source.device.type, dtype=torch.bfloat16) if compute == ("dense", True) else None
        with rounded or nullcontext():
            x, y = self.normalise(source), target.float() * self.target_scale
            residual = y if self.W_skip is None else y - torch.nn.functional.linear(x, self.W_skip).float()
            trained = self.threshold if self.activation.thresholds == "trained" else None
            weights = Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, trained)
            per_token = self._per_token(target, objective.cap_massive)
            if compute.backend == "dense":
                output = dense_loss(x, residual, weights, objective, per_token)
            else:
                output = sparse_loss(x, residual, weights, objective, workspace, compute.bfloat16, per_token)
        counted = y.new_ones(len(y), dtype=torch.bool) if per_token is None else per_token.counted
        y = y * counted[:, None]
        square = torch.linalg.vector_norm(y, dim=1).double().square().sum()
        return TrainOutput(*output, counted.sum(), y.sum(0), square)

    def _per_token(self, target: Tensor, cap_massive: bool) -> PerToken | None:
        """What massive tokens change; None, on a CPU, where there are none."""
        massive = self.massive(target)
        if not is_gpu(massive.device) and not bool(massive.any()):  # a GPU would wait to look
            return None
        scale = cap(target, self.massive_norm) if cap_massive else torch.ones_like(massive, dtype=torch.float32)
        return PerToken(scale, ~massive)

    @torch.no_grad()
    def project(self) -> None:
        """Keep thresholds that are trained at 0 or above, after a step of the optimizer."""
        if self.activation.thresholds == "trained":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def initialise(
        self,
        source: Tensor,
        target: Tensor,
        seed: int = 0,
        directions: Tensor | None = None,
        with_massive: bool = False,
    ) -> None:
        """Set scalars, encoder and biases from the first raw activations of all ranks, each with a share of them.

        Targets get a mean squared norm of d_target and b_dec is their mean; their norms tell `massive_norm`, and tokens
        above it are in none of the other figures, unless `with_massive`. W_enc's rows have norm 1 and none is a copy of
        another: first the `directions` [n, d_source], if there are any, then source tokens drawn by `seed`, less the
        mean (mtc.transcoder.starts). b_enc = -W_enc mean(x) centres the pre-activations.
        """
        self.massive_norm.copy_(massive_norm(target))
        usual = ~self.massive(target) | with_massive
        y = target[usual].double()
        self.target_scale.copy_((y.shape[1] / _mean_over_ranks(y.square().sum(1))).sqrt())
        if self.shape.input_norm == "scalar":
            x = source[usual].double()
            self.input_scale.copy_((x.shape[1] / _mean_over_ranks(x.square().sum(1))).sqrt())
        self.b_dec.copy_(_mean_over_ranks(y) * self.target_scale)
        x = self.normalise(source[usual])
        mean = _mean_over_ranks(x.double()).float()
        rows = x.new_empty(0, x.shape[1])
        features, keep = self.num_features, None
        if self.shard is not None:
            features, keep = sum(self.shard.group_sizes), self.shard.places
        if directions is not None:
            rows = unit(directions[directions.norm(dim=1) > 0].to(x))
            rows = rows[distinct(rows, features)]
        self.W_enc.copy_(draw_distinct(x - mean, features, seed, rows, keep))
        self.b_enc.copy_(-(self.W_enc @ mean))

    def _check_calibrated(self) -> None:
        if bool(self.threshold.isnan().any()):
            raise ValueError("the transcoder's threshold is not calibrated; train it, or set it, before encoding")

    def _check_prefix(self, prefix: int | None) -> int:
        if prefix is None:
            return self.num_features
        if prefix not in self.prefixes:
            raise ValueError(f"prefix={prefix} is not one of the nested dictionaries {list(self.prefixes)}")
        return prefix

    # Files ----------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a calibrated threshold may be one for each feature, and a state without `massive_norm`, of older
        files and other libraries, leaves it unknown."""
        if self.activation.thresholds == "calibrated" and "threshold" in state_dict:
            each = state_dict["threshold"].shape == (self.num_features,)
            self.threshold = self.threshold.new_empty((self.num_features,) if each else ())
        unknown = {"massive_norm": torch.full((), float("nan"), dtype=torch.float32)}
        return super().load_state_dict(unknown | dict(state_dict), strict, assign)

    def to_bytes(self) -> bytes:
        """The weights as a safetensors file, with the shape in its metadata."""
        if self.shard is not None:
            raise ValueError(
                f"rank {self.shard.rank} has a share of the transcoder: mtc.training.assemble makes its file of all"
            )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return save_safetensors(tensors, file_metadata(self.shape))

    @classmethod
    def load(cls, path: str, device: str | torch.device = "cpu", prefix: int | None = None) -> MatryoshkaTranscoder:
        """Read a local weights file; with `prefix`, only the nested dictionary of the first so many features, which is
        a transcoder by itself, and no other features' rows are read.

        Raises ValueError for a file that is no transcoder or of an unknown version, for a prefix that it lacks, and for
        a prefix of a TopK transcoder, whose features compete with all others.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                version = metadata.get("format_version")
                if metadata.get("format") != "mtc-transcoder" or version not in READABLE:
                    raise ValueError(
                        f"{path}: format {metadata.get('format')!r} version {version!r} is not readable here; "
                        f"expected 'mtc-transcoder' version {' or '.join(READABLE)}"
                    )
                saved = json.loads(metadata["shape"])
                shape = TranscoderShape(**saved | {"group_sizes": tuple(saved["group_sizes"])})
                if prefix is not None:
                    shape = shape.cut(prefix)
                transcoder = cls(shape)
                transcoder.load_state_dict({name: _read(file, name, prefix) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        return transcoder.to(device)


def file_metadata(shape: TranscoderShape) -> dict[str, str]:
    """What a weights file says of a transcoder beside its tensors."""
    metadata = {"format": "mtc-transcoder", "format_version": str(FORMAT_VERSION)}
    return metadata | {"shape": json.dumps(shape._asdict())}


def _read(file: Any, name: str, prefix: int | None) -> Tensor:
    """A tensor of a weights file; where its rows are features, those of the prefix."""
    is_cut = prefix is not None and name in BY_FEATURE and file.get_slice(name).get_shape()
    return file.get_slice(name)[:prefix] if is_cut else file.get_tensor(name)


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over the first dimension of all ranks' rows."""
    total = values.sum(0)
    all_reduce(total)
    (count,) = agree(len(values))
    return total / count
