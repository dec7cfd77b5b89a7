"""The Matryoshka transcoder: a sparse one-hidden-layer network whose dictionary is nested in prefixes.

    z   = ReLU(norm(x) W_enc^T + b_enc)                    pre-activations of all F features
    a   = z where z is among the k * B largest of the global batch (training), or z > threshold (inference)
    y_m = sum over features j < m of a_j W_dec[j] + b_dec  one reconstruction per prefix m

BatchTopK: Bussmann et al. 2024, arXiv:2412.06410. Matryoshka dictionaries: Bussmann et al. 2025, arXiv:2503.17547.
Transcoders: Dunefsky et al. 2024, arXiv:2406.11944. AuxK: Gao et al. 2024, arXiv:2406.04093.
Callers always pass and get raw activations; the scaling of inputs and targets lives in the weights.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

FORMAT_VERSION = 1
RMS_EPS = 1e-6


class TranscoderShape(NamedTuple):
    """What a weights file needs to be read again."""

    d_source: int
    d_target: int
    group_sizes: tuple[int, ...]
    k: int
    input_norm: str


class TrainOutput(NamedTuple):
    """Result of a training forward pass over this rank's share of the batch."""

    loss: Tensor
    """Scalar: mean over prefixes of the squared error / d_target, plus the weighted AuxK loss."""
    prefix_errors: Tensor
    """[prefixes], mean squared error per token / d_target, in scaled units."""
    aux_loss: Tensor
    """Scalar, not weighted; 0 without dead features."""
    num_active: Tensor
    """Scalar, selected entries of this rank."""
    fired: Tensor
    """[features], bool: selected at least once on this rank."""


class MatryoshkaTranscoder(nn.Module):
    """Weights W_enc [features, d_source], b_enc [features], W_dec [features, d_target], b_dec [d_target], float32.

    Buffers: `input_scale` and `target_scale` (scalars that multiply sources and targets), `threshold` (scalar, NaN
    until calibrated) and `tokens_since_fired` [features], int64.
    """

    input_scale: Tensor
    target_scale: Tensor
    threshold: Tensor
    tokens_since_fired: Tensor

    def __init__(self, shape: TranscoderShape, seed: int = 0):
        super().__init__()
        self.shape = shape
        features = sum(shape.group_sizes)
        generator = torch.Generator().manual_seed(seed)
        encoder = torch.randn(features, shape.d_source, generator=generator)
        self.W_enc = nn.Parameter(encoder / encoder.norm(dim=1, keepdim=True))
        self.b_enc = nn.Parameter(torch.zeros(features))
        # A decoder that starts at zero lets each feature take its direction from the first residuals it sees.
        self.W_dec = nn.Parameter(torch.zeros(features, shape.d_target))
        self.b_dec = nn.Parameter(torch.zeros(shape.d_target))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((), float("nan")))
        self.register_buffer("tokens_since_fired", torch.zeros(features, dtype=torch.int64))

    @property
    def num_features(self) -> int:
        return self.W_enc.shape[0]

    @property
    def prefixes(self) -> tuple[int, ...]:
        return tuple(end for _, end in self.groups)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """First and one-past-last feature of each group."""
        ends = [0]
        for size in self.shape.group_sizes:
            ends.append(ends[-1] + size)
        return list(pairwise(ends))

    # Inference ------------------------------------------------------------------------------------------------------

    def encode(self, source: Tensor, prefix: int | None = None) -> Tensor:
        """Feature activations of raw source activations: [tokens, d_source] -> [tokens, prefix or features].

        Raises ValueError if the threshold was never calibrated or `prefix` is not one of `prefixes`.
        """
        if bool(self.threshold.isnan()):
            raise ValueError("the transcoder's threshold is not calibrated; train it, or set it, before encoding")
        z = self.pre_activations(source, self._check_prefix(prefix))
        return z * (z > self.threshold)

    def decode(self, activations: Tensor) -> Tensor:
        """Raw reconstruction from activations of all features or of one prefix: [tokens, m] -> [tokens, d_target]."""
        m = self._check_prefix(activations.shape[-1])
        return (activations @ self.W_dec[:m] + self.b_dec) / self.target_scale

    def decode_prefixes(self, activations: Tensor) -> Tensor:
        """Raw reconstruction of every prefix: [tokens, features] -> [prefixes, tokens, d_target]."""
        return self._nested(activations) / self.target_scale

    def reconstruct(self, source: Tensor, prefix: int | None = None) -> Tensor:
        return self.decode(self.encode(source, prefix))

    def pre_activations(self, source: Tensor, prefix: int | None = None) -> Tensor:
        """z = ReLU(norm(x) W_enc^T + b_enc), float32, [tokens, prefix or features]."""
        x = self.normalise(source)
        return torch.relu(torch.nn.functional.linear(x, self.W_enc[:prefix], self.b_enc[:prefix]).float())

    def normalise(self, source: Tensor) -> Tensor:
        """Scale raw sources: `rms` divides each token by its root mean square, `scalar` is one number."""
        x = source.float()
        if self.shape.input_norm == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS)
        return x * self.input_scale if self.shape.input_norm == "scalar" else x

    # Training -------------------------------------------------------------------------------------------------------

    def forward(self, source: Tensor, target: Tensor, aux_k: int, aux_coefficient: float, dead: Tensor) -> TrainOutput:
        """Training loss of raw activations [tokens, d_source] and [tokens, d_target] with global-batch BatchTopK.

        `dead` [features], bool, is equal on all ranks. Called on every rank at once when torch.distributed is set up.
        """
        z = self.pre_activations(source)
        keep = batch_topk_mask(z.detach(), self.shape.k * source.shape[0])
        activations = z * keep
        y = target.float() * self.target_scale
        reconstructions = self._nested(activations).float()
        errors = (reconstructions - y).square().sum(-1).mean(-1) / self.shape.d_target  # [prefixes]
        aux = self._aux_loss(z, (y - reconstructions[-1]).detach(), dead, aux_k)
        loss = errors.mean() + aux_coefficient * aux
        return TrainOutput(loss, errors.detach(), aux.detach(), keep.sum(), keep.any(0))

    def _aux_loss(self, z: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """AuxK: each token's `aux_k` strongest dead features reconstruct the detached residual [tokens, d_target]."""
        index = dead.nonzero().squeeze(1)
        if len(index) == 0:
            return z.new_zeros(())
        strongest = z[:, index].topk(min(aux_k, len(index)), dim=1)
        activations = torch.zeros_like(z[:, index]).scatter(1, strongest.indices, strongest.values)
        error = residual - (activations @ self.W_dec[index]).float()
        return error.square().sum(-1).mean() / self.shape.d_target

    def _nested(self, activations: Tensor) -> Tensor:
        """Scaled reconstructions of all prefixes for the cost of one decode: each group decodes once."""
        parts = [(activations[:, a:b] @ self.W_dec[a:b]).float() for a, b in self.groups]
        return torch.stack(parts).cumsum(0) + self.b_dec  # [prefixes, tokens, d_target]

    @torch.no_grad()
    def initialise(self, source: Tensor, target: Tensor) -> None:
        """Set scalars and biases from raw activations of all ranks: targets get a mean squared norm of d_target,
        b_dec is their mean, and b_enc = -W_enc mean(x) centres the pre-activations."""
        y = target.double()
        self.target_scale.copy_((y.shape[1] / _mean_over_ranks(y.square().sum(1))).sqrt())
        if self.shape.input_norm == "scalar":
            x = source.double()
            self.input_scale.copy_((x.shape[1] / _mean_over_ranks(x.square().sum(1))).sqrt())
        self.b_dec.copy_(_mean_over_ranks(y) * self.target_scale)
        mean = _mean_over_ranks(self.normalise(source).double()).float()
        self.b_enc.copy_(-(self.W_enc @ mean))

    def _check_prefix(self, prefix: int | None) -> int:
        if prefix is None:
            return self.num_features
        if prefix not in self.prefixes:
            raise ValueError(f"prefix={prefix} is not one of the nested dictionaries {list(self.prefixes)}")
        return prefix

    # Files ----------------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The weights as a safetensors file, with the shape in its metadata."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "mtc-transcoder", "format_version": str(FORMAT_VERSION)}
        return save_safetensors(tensors, metadata | {"shape": json.dumps(self.shape._asdict())})

    @classmethod
    def load(cls, path: str, device: str | torch.device = "cpu") -> MatryoshkaTranscoder:
        """Read a local weights file; raises ValueError for a file that is no transcoder or of an unknown version."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                version = metadata.get("format_version")
                if metadata.get("format") != "mtc-transcoder" or version != str(FORMAT_VERSION):
                    raise ValueError(
                        f"{path}: format {metadata.get('format')!r} version {version!r} is not readable here; "
                        f"expected 'mtc-transcoder' version '{FORMAT_VERSION}'"
                    )
                shape = json.loads(metadata["shape"])
                transcoder = cls(TranscoderShape(**shape | {"group_sizes": tuple(shape["group_sizes"])}))
                transcoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
        return transcoder.to(device)


def batch_topk_mask(z: Tensor, count: int) -> Tensor:
    """Mask of the largest positive entries of `z` [tokens, features] over the batches of all ranks together.

    `count` is this rank's share (k * tokens); the shares add up. Exactly that many are chosen unless there are fewer
    positive entries; ties at the border are broken by rank, then row, then feature. One rank with a batch and several
    with its parts therefore choose the same entries.
    """
    counts = _all_gather_int(count, z.device)
    total = sum(counts)
    border = kth_largest(z, total)
    above = z > border
    if border <= 0:
        return z > 0
    tied = z == border
    numbers = torch.stack([above.sum(), tied.sum()])
    gathered = _all_gather(numbers)  # [ranks, 2]
    rank = dist.get_rank() if _distributed() else 0
    free = total - int(gathered[:, 0].sum()) - int(gathered[:rank, 1].sum())  # ties left for this and later ranks
    if free >= int(numbers[1]):
        return above | tied
    if free <= 0:
        return above
    chosen = tied.flatten().nonzero().squeeze(1)[:free]
    above.view(-1)[chosen] = True
    return above


def kth_largest(values: Tensor, count: int) -> float:
    """The count-th largest positive float32 of all ranks' `values`, exactly; 0.0 if fewer are positive.

    Positive floats order like their bit patterns, so two histograms, of the upper and of the lower 16 bits, find the
    value without a sort and with two small all-reduces.
    """
    bits = values[values > 0].view(torch.int32)
    upper = torch.bincount(bits >> 16, minlength=1 << 15)
    _all_reduce(upper)
    suffix = upper.flip(0).cumsum(0).flip(0)  # entries in this bin or above
    if int(suffix[0]) < count:
        return 0.0
    high = int((suffix >= count).sum()) - 1
    rest = count - (int(suffix[high]) - int(upper[high]))
    lower = torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=1 << 16)
    _all_reduce(lower)
    low = int((lower.flip(0).cumsum(0).flip(0) >= rest).sum()) - 1
    return torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32).item()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(tensor: Tensor) -> None:
    if _distributed():
        dist.all_reduce(tensor)


def _all_gather(tensor: Tensor) -> Tensor:
    """[...] on each rank -> [ranks, ...]."""
    if not _distributed():
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def _all_gather_int(value: int, device: torch.device) -> list[int]:
    return [int(v) for v in _all_gather(torch.tensor(value, device=device))]


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over the first dimension of all ranks' rows."""
    total, count = values.sum(0), torch.tensor(float(len(values)), dtype=torch.float64, device=values.device)
    _all_reduce(total)
    _all_reduce(count)
    return total / count
