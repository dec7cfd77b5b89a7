"""What the sections of `python -m benchmarks.gpu` share, and its checks of single operations.

Every check compares with an independent truth: float64 on the CPU, a stable sort, autograd, a formula, or the same work
done with the host waiting after every step. Without a GPU the same branches run on the CPU (mtc.devices.PRETENDING).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtc import devices
from mtc.transcoder import Workspace, entry_dots, kth_largest
from mtc.transcoder.products import Bags, bag_sums, make_bags
from mtc.transcoder.selection import keep_largest, largest_entries
from mtc.transcoder.sparse_loss import Entries, nested_residuals

FLOAT32 = 1e-5
"""Largest relative error of a float32 sum of products: some thousand roundings of 2^-24, mostly of both signs."""
PATIENCE = 90.0
"""Seconds that other processes are waited for."""


class Setting(NamedTuple):
    """Where sections run."""

    device: torch.device
    """The GPU, or the CPU that is taken for one."""
    small: bool
    """Small shapes."""
    scratch: str
    """A directory that is removed at the end."""
    memory: str
    """The same, in main memory if there is room: for models of some gigabytes."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


class Findings:
    """The checks and figures of one section, and the time that it has."""

    def __init__(self, seconds: float = math.inf, notes: dict[str, Any] | None = None):
        self.checks: dict[str, dict[str, Any]] = {}
        """By name: `ok`, and `error` and `limit` where a number decides."""
        self.figures: dict[str, Any] = {}
        self.notes = {} if notes is None else notes
        """What later sections need of earlier ones' figures."""
        self._end = time.perf_counter() + seconds

    @property
    def seconds_left(self) -> float:
        return self._end - time.perf_counter()

    def check(self, name: str, ok: bool, **details: Any) -> None:
        """Of several under one name the worst is kept: a failed one, else that of the largest error."""
        made = {"ok": bool(ok)} | details
        before = self.checks.get(name)
        if before is None or (not made["ok"], made.get("error", 0)) > (not before["ok"], before.get("error", 0)):
            self.checks[name] = made

    def compare(self, name: str, error: float, limit: float, **details: Any) -> None:
        """Passed if the error, which may be NaN, is at most the limit."""
        self.check(name, error <= limit, error=error, limit=limit, **details)


class Waiting(RuntimeError):
    """The host would have waited for the device."""


class DeviceWatch(TorchDispatchMode):
    """Raises Waiting where an operation would make the host wait for a GPU, whatever device it runs on, and counts
    those that start a kernel.

    The same as torch.cuda.set_sync_debug_mode("error") for what torch's dispatcher sees: not `tolist` of a CPU tensor,
    nor a tensor made on the host. Some operations start several kernels, so `launches` is a lower bound.
    """

    SHAPES_BY_VALUES = ("nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive")
    READ = ("_local_scalar_dense", "equal", "bincount")
    NO_KERNEL = (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "set_",
        "lift_fresh", "_unsafe_view", "_reshape_alias", "record_stream", "is_pinned", "_pin_memory", "pin_memory",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if why := self._waits(name, func, args, kwargs):
            raise Waiting(f"{func} {why}")
        if func.namespace == "aten" and not func.is_view and name not in self.NO_KERNEL:
            self.launches += 1
        return func(*args, **kwargs)

    def _waits(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if name in self.SHAPES_BY_VALUES:
            return "has a shape that only the device knows"
        if name in self.READ:
            return "reads values from the device"
        if name == "repeat_interleave" and func._overloadname != "self_int" and kwargs.get("output_size") is None:
            return "has a shape that only the device knows"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            filled = name != "index" and len(masks) == 1 and args[2].numel() == 1  # runs as masked_fill
            return "has an index that is a mask" if masks and not filled else None
        if name in ("_to_copy", "copy_"):
            there = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if name == "copy_" else args[0]
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            return "copies between devices" if there.type != source.device.type and waits else None
        return None


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A context in which making the host wait for the device is an error."""
    if device.type != "cuda":
        with DeviceWatch():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def host_only() -> Iterator[None]:
    """A context in which the CPU is a CPU, with the loops and branches that are written for one."""
    before = devices.PRETENDING
    devices.PRETENDING = False
    try:
        yield
    finally:
        devices.PRETENDING = before


def relative_error(found: Any, truth: Any) -> float:
    """||found - truth|| / ||truth||, in float64; infinite for another shape or what is not finite."""
    found, truth = (torch.as_tensor(part).detach().cpu().double() for part in (found, truth))
    if found.shape != truth.shape:
        return math.inf
    error = float((found - truth).norm()) / max(float(truth.norm()), 1e-300)
    return error if math.isfinite(error) else math.inf


def device(setting: Setting, findings: Findings) -> None:
    """What it is, and that its float32 products are float32."""
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    findings.check("float32 products are not TF32's", exact)
    findings.figures |= {"torch": torch.__version__, "gpu": setting.on_gpu}
    if setting.on_gpu:
        about = torch.cuda.get_device_properties(setting.device)
        findings.figures |= {"name": about.name, "capability": f"{about.major}.{about.minor}"}
        free, total = torch.cuda.mem_get_info()
        findings.figures |= {"bytes": total, "bytes in use by others": total - free}


# The operations -----------------------------------------------------------------------------------------------------


def operations(setting: Setting, findings: Findings) -> None:
    """bag_sums, make_bags, entry_dots and nested_residuals against dense products in float64."""
    rows, width, bags, entries = (150, 40, 90, 900) if setting.small else (4608, 2304, 3072, 49_152)
    generator = torch.Generator().manual_seed(0)
    uneven = torch.bincount(torch.randint(bags // 2, (entries,), generator=generator) * 2, minlength=bags)
    shapes = {
        "uneven, half of them empty": uneven.tolist(),
        "one of 4,096 among short ones": [3, 0, 4096, 1, 0, 64, 65, 63, 128, 0, *[2] * 50],
        "no entries": [0] * 7,
        "every row": [rows] * 12,
    }
    for name, lengths in shapes.items():
        count = sum(lengths)
        table = torch.randn(rows, width, generator=generator)
        index, weight = torch.randint(rows, (count,), generator=generator), torch.randn(count, generator=generator)
        bag = torch.repeat_interleave(torch.tensor(lengths))
        offsets = torch.tensor([0, *np.cumsum(lengths).tolist()])
        made = make_bags(offsets.to(setting.device), count)
        there = [part.to(setting.device) for part in (table, index, weight)]
        sums = bag_sums(*there, made)
        dense = torch.zeros(len(lengths), rows, dtype=torch.float64)
        dense.index_put_((bag, index), weight.double(), accumulate=True)
        findings.compare(f"bag_sums, {name}", relative_error(sums, dense @ table.double()), FLOAT32)
        findings.check("bag_sums again, to the last bit", torch.equal(sums, bag_sums(*there, made)))
        left = torch.randn(len(lengths), width, generator=generator)
        dots = entry_dots(left.to(setting.device), bag.to(setting.device), there[0], there[1])
        truth = (left.double() @ table.double().T)[bag, index]
        findings.compare(f"entry_dots, {name}", relative_error(dots, truth), FLOAT32)
    for aux in (False, True):
        _check_nested_residuals(setting, findings, aux)


def _check_nested_residuals(setting: Setting, findings: Findings, aux: bool) -> None:
    tokens, features, width, count = (50, 120, 36, 400) if setting.small else (1024, 4608, 2304, 49_152)
    generator = torch.Generator().manual_seed(1)
    weights, slots = (0.2, 0.3, 0.5, 0.07)[: 3 + aux], 3 + aux
    place = torch.randperm(tokens * features, generator=generator)[:count].sort().values
    token, feature = place // features, place % features
    group = (feature * slots).div(features, rounding_mode="floor")  # the last group is AuxK's, if it is on
    value = torch.rand(count, generator=generator)
    W_dec, y = torch.randn(features, width, generator=generator), torch.randn(tokens, width, generator=generator)
    b_dec = torch.randn(width, generator=generator)
    entries = _entries(token, feature, token * slots + group, slots, tokens, features, setting.device)
    there = [part.to(setting.device) for part in (value, W_dec, b_dec, y)]
    found = nested_residuals(*there, entries, weights, aux, Workspace())

    dense = torch.zeros(tokens, features, dtype=torch.float64)
    dense[token, feature] = value.double()
    residual, residuals = b_dec.double() - y.double(), []
    for slot in range(slots):
        inside = (torch.arange(features) * slots).div(features, rounding_mode="floor") == slot
        residual = residual + dense[:, inside] @ W_dec.double()[inside]
        residuals.append(residual)
    pulls = [2 * w * r for w, r in zip(weights, residuals, strict=True)]
    H = torch.stack([sum(pulls[slot:3]) if slot < 3 else pulls[slot] for slot in range(slots)], 1)
    d_value = torch.stack([H[:, slot] @ W_dec.double().T for slot in range(slots)])[group, token, feature]
    errors = torch.stack([r.square().sum(1) for r in residuals], 1)
    for name, got, truth in zip(("H", "gradient", "errors"), found, (H, d_value, errors), strict=True):
        findings.compare(f"nested_residuals{', AuxK' if aux else ''}: {name}", relative_error(got, truth), FLOAT32)


def _entries(
    token: Tensor, feature: Tensor, slot: Tensor, slots: int, tokens: int, features: int, device: torch.device
) -> Entries:
    order = feature.argsort(stable=True)

    def bags(index: Tensor, size: int) -> Bags:
        return make_bags(torch.searchsorted(index, torch.arange(size + 1)).to(device), len(index))

    columns = [part.to(device) for part in (token, feature, slot)]
    return Entries(*columns, bags(slot, tokens * slots), order.to(device), bags(feature[order].contiguous(), features))


# Selection ----------------------------------------------------------------------------------------------------------


def selection(setting: Setting, findings: Findings) -> None:
    """largest_entries, keep_largest and kth_largest against a stable sort, without a wait for the device."""
    for name, z, count in _selection_inputs(setting):
        flat = z.flatten()
        with no_waiting(setting.device):
            chosen, _ = largest_entries(z, count)
            keep, border = keep_largest(flat, count)
            kth = kth_largest(flat, count)
        values = flat.cpu().numpy()
        exact = _exact_choice(values, count)
        real = (chosen.value > 0).cpu()
        places = (chosen.token * z.shape[1] + chosen.feature).cpu()[real].numpy()
        same = np.array_equal(places, exact) and np.array_equal(chosen.value.cpu()[real].numpy(), values[exact])
        findings.check(f"largest_entries, {name}", same and len(chosen.value) == min(count, len(values)))
        findings.check(f"keep_largest, {name}", np.array_equal(np.flatnonzero(keep.cpu().numpy()), exact))
        smallest = values[exact].min() if len(exact) == count else 0.0
        findings.check(f"kth_largest, {name}", float(kth) == float(border) == smallest)


def _selection_inputs(setting: Setting) -> Iterator[tuple[str, Tensor, int]]:
    """Names, pre-activations [tokens, features] and how many are to be chosen."""
    tokens, features, wide, k = (40, 300, 4096, 6) if setting.small else (1024, 4608, 65_536, 48)
    generator = torch.Generator(setting.device).manual_seed(0)

    def noise(features: int) -> Tensor:
        return torch.randn(tokens, features, generator=generator, device=setting.device)

    count = k * tokens
    yield "random", noise(features), count
    yield "ties", noise(features).mul_(2).round_(), count
    z = noise(features)
    z[::3, ::7], z[1::5, ::11] = torch.nan, torch.inf
    yield "NaN and infinity", z, count
    yield "few positive", noise(features).sub_(3), count
    yield "none positive", noise(features).abs_().neg_(), count
    yield "one", noise(features), 1
    yield "more than there are", noise(8), 9 * tokens
    yield f"random, {wide:,} features", noise(wide), count
    yield f"ties, {wide:,} features", noise(wide).mul_(2).round_(), count


def _exact_choice(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest positive values, equal ones by place; ascending."""
    positive = np.where(values > 0, values, np.float32(0))  # NaN is not positive
    if count < len(values):  # sort only what can be among them
        border = np.partition(positive, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(positive >= max(border, np.finfo(np.float32).smallest_subnormal))
    else:
        candidates = np.flatnonzero(positive)
    order = np.argsort(-positive[candidates], kind="stable")[:count]
    return np.sort(candidates[order])
