"""What is written for GPUs in the forward pass, as far as a CPU can prove it: the one row of FlexAttention with its
mask, how often things compile, what happens where they don't, and the sums behind the figures."""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_language_model import ARCHITECTURES
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention.flex_attention import create_block_mask

from mtc import devices
from mtc.analysis import loss_sums, token_sums
from mtc.config import ModelConfig
from mtc.language_model import LanguageModel, PackedWindows, SitePair, attention, compiling, flex, pack_windows
from mtc.language_model.attention import Windows
from mtc.language_model.flex import Kernel
from mtc.language_model.model import WARM_WITHOUT_KERNEL

pytestmark = pytest.mark.slow
MIXED = ([300, 70, 1, 5, 200], [128, 127, 1, 128], [40, 250], [257])
compile_ = torch.compile


class Backend:
    """Counts compilations; the graphs run as they are traced, or what `fail` raises is what the compiler says."""

    def __init__(self, name: str = "aot_eager"):
        self.compiled = 0
        self.fail: Callable[[], BaseException] | None = None
        self._backend: Any = lookup_backend(name) if name else aot_autograd(fw_compiler=_unrun)

    def __call__(self, graph: Any, examples: Any, **options: Any) -> Any:
        self.compiled += 1
        if self.fail is not None:
            raise self.fail()
        return self._backend(graph, examples)


def _unrun(graph: Any, examples: Any) -> Callable[..., Any]:
    """Attention of the right shape, without the products that a large row would take on a CPU."""

    def run(arguments: list[Any]) -> list[Tensor]:
        query = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
        return [query.new_zeros(()).expand(query.shape)]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """What torch.compile compiles with."""
    found = Backend()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=found, **options))
    with fresh_compiler():
        yield found


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and nothing of what is stays."""
    cached = flex._compiled_flex
    torch._dynamo.reset()
    cached.cache_clear()
    try:
        yield
    finally:
        torch._dynamo.reset()
        cached.cache_clear()


def columns(tokens: int, heads: int, shared: int, width: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Query, key and value as models have them: [1, heads, tokens, width], laid out token by token."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, width), (shared, width), (shared, width))
    return tuple(torch.randn(1, tokens, *shape, generator=generator).transpose(1, 2) for shape in shapes)


def attend(
    parts: Sequence[Tensor], lengths: Sequence[int], kernel: Kernel | None, softcap: float | None, reach: int | None
) -> Tensor:
    windows = Windows(lengths, "cpu", kernel)
    with torch.inference_mode(), flex.compiler_settings():
        out, _ = attention.attend(
            torch.nn.Identity(), *parts, None, scaling=0.3, softcap=softcap, sliding_window=reach, windows=windows
        )
    return out


def dense(parts: Sequence[Tensor], lengths: Sequence[int], softcap: float | None, reach: int | None) -> Tensor:
    """[1, tokens, heads, width] in float64, window by window, every pair of tokens."""
    q, k, v = (part[0].double() for part in parts)
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    results = []
    for a, b, c in zip(*(part.split(list(lengths), dim=1) for part in (q, k, v)), strict=True):
        scores = 0.3 * a @ b.transpose(1, 2)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        n = a.shape[1]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        visible = (distance >= 0) & (distance < (reach or n))
        results.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ c)
    return torch.cat(results, 1).transpose(0, 1)[None]


# Each shape with each softcap and each reach, and each softcap with each reach.
@pytest.mark.parametrize(
    ("heads", "shared", "width", "softcap", "reach"),
    [
        (4, 2, 16, None, None), (4, 2, 16, 5.0, 100), (2, 2, 80, None, 100), (2, 2, 80, 5.0, None),
        (8, 1, 64, None, None), (8, 1, 64, 5.0, 100), (2, 1, 256, None, 100), (2, 1, 256, 5.0, None),
    ],
)  # fmt: skip
def test_one_row_equals_dense_attention(
    backend: Backend, heads: int, shared: int, width: int, softcap: float | None, reach: int | None
) -> None:
    kernel = Kernel()
    for lengths in MIXED:
        parts = columns(sum(lengths), heads, shared, width)
        got = attend(parts, lengths, kernel, softcap, reach)
        torch.testing.assert_close(got.double(), dense(parts, lengths, softcap, reach), rtol=1e-4, atol=2e-5)
    assert kernel.failed is None
    assert backend.compiled == 1


@pytest.mark.parametrize("seed", range(8))
def test_mask_from_lengths_is_that_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 3, 64, 127, 128, 129, 300, 512], rng.integers(1, 9)).tolist()
    reach = [None, 1, 50, 128, 200][int(rng.integers(5))]
    mask = flex.block_mask(lengths, reach)
    total = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    visible = (owner[:, None] == owner) & (distance >= 0) & (distance < (reach or total))
    row = torch.arange(total)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, row[:, None], row), visible)

    def pair(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query - key < (reach or total)
        return (owner[query] == owner[key]) & (query >= key) & near

    assert torch.equal(mask.to_dense(), create_block_mask(pair, None, None, total, total, device="cpu").to_dense())
    # Those seen whole are: for every block of queries, the blocks of keys that no query of it sees in part.
    whole = torch.zeros(mask.to_dense().shape[2:], dtype=torch.bool)
    for i, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        whole[i, mask.full_kv_indices[0, 0, i, :count].long()] = True
    size = flex.BLOCK
    for i, j in itertools.product(range(len(whole)), repeat=2):
        block = visible[i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert bool(whole[i, j]) == (i != j and bool(block.all())), (i, j)
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32


@pytest.mark.parametrize(
    ("first", "heads", "shared", "width"),
    [([300, 71], 9, 3, 16), ([200, 56], 4, 2, 128), ([200, 56], 1, 1, 256), ([16000, 384], 4, 2, 128)],
)
def test_shapes_do_not_compile_again(
    monkeypatch: pytest.MonkeyPatch, first: list[int], heads: int, shared: int, width: int
) -> None:
    """One kernel with a cap and one without, for all lengths and reaches; as many again outside inference mode.

    Rows that come first have as many blocks as there are heads of keys or as a head is wide, or as many tokens
    as a head is wide.
    """
    backend, kernel = Backend(""), Kernel()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))

    def run(lengths: list[int], softcap: float | None, reach: int | None) -> int:
        before, windows = backend.compiled, Windows(lengths, "cpu", kernel)
        if softcap is None and reach is None and windows.alike:
            return 0  # a rectangle
        shapes = ((heads, width), (shared, width), (shared, width))
        parts = [torch.empty(1, sum(lengths), *shape).transpose(1, 2) for shape in shapes]
        with flex.compiler_settings():
            attention.attend(
                torch.nn.Identity(), *parts, None, scaling=0.3, softcap=softcap, sliding_window=reach, windows=windows
            )
        return backend.compiled - before

    rows = [first] + [[each] * many for each in (64, 256, 300, 1024) for many in (1, 3, 16)]
    rows += [[300, 70, 1, 5], [16384 - 300, 300], [129, 128], [1000] * 9 + [3]]
    rows = [lengths for lengths in rows if sum(lengths) >= attention.LEAST_FLEX]
    with fresh_compiler():
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                for softcap in (50.0, None):
                    assert sum(run(lengths, softcap, reach) for reach in (None, 50, 200) for lengths in rows) == 1
    assert kernel.failed is None


def test_rectangles_where_they_are_faster() -> None:
    class Never(Kernel):
        def attend(self, *arguments: Any) -> Tensor | None:
            raise AssertionError("asked for the kernel")

    for lengths, width, softcap, reach in (
        ([256] * 3, 16, None, None),  # of one length
        ([256] * 3, 16, None, 256),  # which this reach does not cut off
        ([100, 155], 16, 5.0, None),  # a short row
        ([300, 70], 8, 5.0, None),  # heads that are too narrow for Triton
    ):
        parts = columns(sum(lengths), 2, 1, width)
        got = attend(parts, lengths, Never(), softcap, reach)
        torch.testing.assert_close(got.double(), dense(parts, lengths, softcap, reach), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="asked for the kernel"):
        attend(columns(768, 2, 1, 16), [256] * 3, Never(), None, 255)


def test_a_kernel_that_does_not_compile_is_done_without(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    backend.fail = lambda: NotImplementedError("no such GPU")
    kernel, parts = Kernel(), columns(370, 2, 1, 16)
    with caplog.at_level(logging.WARNING, "mtc.language_model.flex"):
        for _ in range(2):
            got = attend(parts, [300, 70], kernel, 5.0, None)
            torch.testing.assert_close(got.double(), dense(parts, [300, 70], 5.0, None), rtol=1e-4, atol=1e-5)
    assert backend.compiled == 1
    assert kernel.failed is not None and kernel.failed.startswith("BackendCompilerFailed: backend=")
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA out of memory in a process")]
)
def test_lack_of_memory_while_compiling_is_no_failure_of_the_compiler(backend: Backend, error: Exception) -> None:
    kernel, parts = Kernel(), columns(370, 2, 1, 16)
    backend.fail = lambda: error
    with pytest.raises(Exception, match="out of memory"):
        attend(parts, [300, 70], kernel, 5.0, None)
    assert kernel.failed is None
    backend.fail = None
    got = attend(parts, [300, 70], kernel, 5.0, None)
    torch.testing.assert_close(got.double(), dense(parts, [300, 70], 5.0, None), rtol=1e-4, atol=1e-5)
    assert backend.compiled == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: assert")])
def test_errors_of_the_device_are_raised(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> Tensor:
        raise error

    monkeypatch.setattr(flex, "_compiled_flex", lambda: fail)
    kernel = Kernel()
    with pytest.raises(type(error), match="CUDA"):
        attend(columns(370, 2, 1, 16), [300, 70], kernel, 5.0, None)
    assert kernel.failed is None


@pytest.mark.parametrize(
    ("shared", "width", "itemsize", "rows", "columns", "stages"),
    [  # what Triton 3.7 compiled for compute capability 8.6, with the shared memory that it then needs
        (99, 256, 2, 32, 64, 2),  # 86016; torch's 32, 64, 3: 151552
        (99, 192, 2, 64, 32, 2),  # torch's 128, 32, 2: 106496
        (99, 128, 4, 64, 32, 2),  # 73984; torch's 128, 32, 3: 147968
        (99, 256, 4, 32, 16, 2),  # 67712; torch's 64, 16, 3: 135424
        (163, 96, 4, 64, 64, 2),  # torch's 64, 64, 3: 180480
    ],
)
def test_blocks_are_smaller_where_shared_memory_is_short(
    shared: int, width: int, itemsize: int, rows: int, columns: int, stages: int
) -> None:
    expected = {"BLOCK_M": rows, "BLOCK_N": columns, "num_stages": stages}
    assert flex.kernel_options(shared * 1024, width, itemsize) == expected


@pytest.mark.parametrize(
    ("hopper", "choice", "width", "itemsize", "needed"),
    [  # as Triton 3.7 compiled torch's choice for 8.6 and 9.0
        (False, (128, 64, 3), 64, 2, 49152),
        (False, (128, 32, 3), 64, 4, 82432),
        (False, (128, 64, 3), 128, 2, 98304),
        (False, (64, 64, 3), 96, 2, 90112),
        (True, (128, 128, 3), 64, 2, 114688),
        (True, (128, 64, 3), 128, 2, 131072),
        (True, (64, 64, 3), 192, 2, 229376),
        (True, (64, 32, 3), 256, 2, 131072),
        (True, (32, 64, 3), 128, 4, 155776),
        (True, (32, 32, 3), 256, 4, 168064),
    ],
)
def test_torchs_blocks_are_left_where_they_fit(
    hopper: bool, choice: tuple[int, int, int], width: int, itemsize: int, needed: int
) -> None:
    assert flex._torch_choice(hopper, width, itemsize) == choice
    assert flex._needed(hopper, *choice, width, itemsize) == needed
    for shared in [227] if hopper else [163, 99]:
        assert flex.kernel_options(shared * 1024, width, itemsize) is None
    assert flex.kernel_options(163 * 1024, 256, itemsize) is None


# The whole pass -----------------------------------------------------------------------------------------------------


def config(architecture: str = "gemma2", compiled: bool | None = True) -> ModelConfig:
    return ModelConfig(name=f"random:{architecture}", layer=1, dtype="float32", compile=compiled)


def windows(lengths: Sequence[int]) -> PackedWindows:
    rng = np.random.default_rng(sum(lengths))
    return pack_windows([rng.integers(0, 256, n).astype(np.int32) for n in lengths], [256])


def assert_same(got: tuple[SitePair, ...], expected: tuple[SitePair, ...]) -> None:
    for ours, theirs in zip(got[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU, and the tiny models' narrow heads for wide ones."""
    monkeypatch.setattr(devices, "PRETENDING", True)
    monkeypatch.setattr(attention, "LEAST_HEAD", 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_the_warm_up_nothing_compiles(gpu: None, backend: Backend, architecture: str) -> None:
    plain = LanguageModel(config(architecture, False))
    model = LanguageModel(config(architecture))
    assert plain.compute == "eager (model.compile=false)"
    model.warm_up(600)
    assert model.compute == "compiled"
    assert 0 < backend.compiled <= 12
    after = backend.compiled
    rng = np.random.default_rng(0)
    for lengths in ([1], [2], [300, 200], [32], [64, 32], [256], [257], [8] * 16, *rng.integers(1, 120, (6, 5))):
        packed = windows([int(length) for length in lengths])
        assert_same(model.capture(packed), plain.capture(packed))
    assert (backend.compiled, model.compute) == (after, "compiled")


def test_without_compilation_a_warm_up_is_short_and_compiles_nothing(
    gpu: None, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(config(compiled=False))
    seen: list[tuple[int, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(model, "capture", lambda packed: seen.append(packed.lengths))
        model.warm_up(1 << 20)
    assert 0 < max(map(sum, seen)) <= WARM_WITHOUT_KERNEL  # all pairs of more tokens might not fit
    model.capture(windows([300, 70]))
    assert backend.compiled == 0


def test_a_cpu_has_nothing_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PRETENDING", False)
    model = LanguageModel(config(compiled=None))
    monkeypatch.setattr(model, "capture", lambda packed: pytest.fail("ran a pass"))
    model.warm_up(600)
    assert model.compute == "eager (on a CPU)"
    assert not model.compiled


def test_a_model_that_does_not_compile_runs_eager(
    gpu: None, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    plain, packed = LanguageModel(config(compiled=False)), windows([300, 70])
    model = LanguageModel(config(), full=True)
    backend.fail = lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    assert model.compiled
    assert any("forward" in vars(module) for module in model.model.modules())
    with caplog.at_level(logging.WARNING, "mtc"):
        assert_same(model.capture(packed), plain.capture(packed))
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert not model.compiled
    assert model.compute.startswith("eager (BackendCompilerFailed: backend=")
    assert len(caplog.records) == 1 and "runs slower" in caplog.text
    backend.fail, tried = None, backend.compiled
    assert_same(model.capture(packed), plain.capture(packed))
    full = LanguageModel(config(compiled=False), full=True)
    torch.testing.assert_close(model.logits(packed), full.logits(packed), rtol=1e-4, atol=1e-4)
    assert backend.compiled == tried


def test_a_compiled_model_whose_attention_does_not_compile(gpu: None, backend: Backend) -> None:
    plain, packed = LanguageModel(config(compiled=False)), windows([300, 70])
    model = LanguageModel(config())
    model.capture(windows([30, 5]))  # norms and MLPs; attention is short
    backend.fail = lambda: NotImplementedError("heads")
    assert_same(model.capture(packed), plain.capture(packed))
    assert model.compiled
    assert model.compute.startswith("compiled, attention eager (BackendCompilerFailed")


def test_lack_of_memory_leaves_the_model_compiled(gpu: None, backend: Backend) -> None:
    model = LanguageModel(config())
    backend.fail = lambda: torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(Exception, match="out of memory"):
        model.capture(windows([300, 70]))
    backend.fail = None
    assert_same(model.capture(windows([300, 70])), LanguageModel(config(compiled=False)).capture(windows([300, 70])))
    assert model.compute == "compiled"


@pytest.mark.parametrize("found", [(), ("gcc",), ("clang",), ("cc",)])
def test_by_default_a_gpu_compiles_where_compilers_are(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: tuple[str, ...]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in found else None)
    monkeypatch.setattr(compiling, "import_module", lambda name: None)
    compiles = found in (("gcc",), ("clang",))
    with caplog.at_level(logging.WARNING, "mtc.language_model.compiling"):
        model = LanguageModel(config(compiled=None))
    assert model.compiled == compiles
    assert model.compute == ("compiled" if compiles else "eager (no C compiler)")
    assert len(caplog.records) == (not compiles)
    assert LanguageModel(config(compiled=True)).compiled  # what is asked for is tried


def test_by_default_a_gpu_without_triton_is_eager(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "a-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "a-compiler" else None)

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(compiling, "import_module", missing)
    assert LanguageModel(config(compiled=None)).compute == "eager (no Triton: No module named 'triton')"


# Sums ---------------------------------------------------------------------------------------------------------------


def test_sums_by_label_equal_index_add() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (1000,), generator=generator).mul(3)
    add = token_sums.sum_by_label(labels, 30)
    for shape in ((1000,), (1000, 5)):
        values = torch.randn(shape, generator=generator)
        expected = torch.zeros((30, *shape[1:]), dtype=torch.float64).index_add_(0, labels, values.double())
        np.testing.assert_allclose(add(values), expected.numpy(), rtol=1e-12, atol=1e-12)
    nothing = token_sums.sum_by_label(labels[:0], 30)
    assert nothing(torch.zeros(0, 5)).shape == (30, 5)


def test_logits_at_a_time_follow_the_memory() -> None:
    assert loss_sums.max_logits(torch.device("cpu")) == loss_sums.MAX_LOGITS
    assert loss_sums._logits_in(0) == loss_sums._logits_in(1 << 30) == loss_sums.MAX_LOGITS
    assert loss_sums._logits_in(64 << 30) == 1 << 30  # 4 GiB of float32
    assert loss_sums._logits_in((64 << 30) - 1) == 1 << 29
