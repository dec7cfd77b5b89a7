"""The sparse loss against the dense one under autograd, against finite differences, and against token-by-token sums."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from mtc import devices
from mtc.transcoder import Objective, Workspace, native, selection
from mtc.transcoder import sparse_loss as kernels
from mtc.transcoder.activations import ACTIVATIONS
from mtc.transcoder.dense_loss import dense_loss
from mtc.transcoder.objective import PerToken, Weights
from mtc.transcoder.selection import _border, _by_histogram, _largest_values, keep_largest
from mtc.transcoder.sparse_loss import sparse_loss

TOKENS, D_SOURCE, D_TARGET, ENDS = 9, 7, 5, (6, 16, 24)
F = ENDS[-1]


@pytest.fixture(params=["compiled", "torch", "as on a GPU"])
def loops(request, monkeypatch):
    """The loops of kernels.c (float32), torch operations, and what a GPU runs."""
    if request.param != "compiled":
        monkeypatch.setattr(native, "runs", lambda tensor: False)
        monkeypatch.setattr(devices, "PRETENDING", request.param == "as on a GPU")
    elif native.load() is None:
        pytest.skip(native.status())
    return request.param


def objective(count=3 * TOKENS, dead=(), aux_k=4, weights=(0.2, 0.3, 0.5), **activation):
    return Objective(ENDS, weights, count, torch.tensor(dead, dtype=torch.int64), aux_k, 0.07, **activation)


TOPK = {"activation": "topk", "k": 3}
JUMP = {"activation": "jumprelu", "k": 3, "l0_weight": 0.2, "bandwidth": 0.8}


def leaves(dtype=torch.float64, seed=0, tokens=TOKENS):
    """x, y and all weights, thresholds the last, each wanting a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, D_SOURCE), (tokens, D_TARGET), (F, D_SOURCE), (F,), (F, D_TARGET), (D_TARGET,), (F,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[-1] = tensors[-1].abs()
    return [t.to(dtype).requires_grad_() for t in tensors]


def loss_and_gradients(loss, tensors, wanted, *arguments):
    """Thresholds only where they are trained."""
    tensors = tensors[: 7 if wanted.activation == "jumprelu" else 6]
    output = loss(tensors[0], tensors[1], Weights(*tensors[2:]), wanted, *arguments)
    return output, torch.autograd.grad(output.loss, tensors)


def make_ties(tensors):
    """Pre-activations are small whole numbers: many are equal, some exactly zero."""
    with torch.no_grad():
        x, _, W_enc, b_enc = tensors[:4]
        x.copy_(x.sign())
        x[:, 0] = 0
        W_enc.copy_(W_enc.sign())
        b_enc.zero_()
        assert ((x @ W_enc.T) == 0).any()


def make_silent_tokens(tensors):
    """Tokens 2 and 3 have no positive pre-activation: their rows of entries are empty."""
    with torch.no_grad():
        x, _, _, b_enc = tensors[:4]
        b_enc.copy_(-b_enc.abs())
        x[2:4] = 0


CASES = {
    "plain": (lambda t: None, objective()),
    "dead features": (lambda t: None, objective(dead=(1, 5, 6, 17, 23))),
    "all dead features chosen": (lambda t: None, objective(dead=(0, 2, 9), aux_k=512)),
    # All dead features are chosen: which of two equal ones is, is up to torch's topk.
    "ties and zeros": (make_ties, objective(dead=(3, 8), aux_k=512)),
    "empty rows": (make_silent_tokens, objective(dead=(1, 20))),
    "k larger than the positives": (lambda t: None, objective(count=TOKENS * F)),
    "nothing positive": (lambda t: t[3].data.fill_(-100), objective(dead=(4,))),
    "by contribution": (lambda t: t[4].data[5:9].zero_(), objective(by_contribution=True, dead=(3, 6))),
    "topk": (lambda t: None, objective(dead=(1, 5), **TOPK)),
    "topk, ties and empty rows": (lambda t: (make_ties(t), make_silent_tokens(t)), objective(**TOPK)),
    "topk by contribution": (lambda t: t[4].data[5:9].zero_(), objective(by_contribution=True, **TOPK)),
    "jumprelu": (lambda t: None, objective(**JUMP)),
    "jumprelu, dead features inside the window": (lambda t: None, objective(dead=(1, 5, 6, 17, 23), **JUMP)),
    "jumprelu, nothing active": (lambda t: t[6].data.fill_(100), objective(dead=(4,), **JUMP)),
}


@pytest.mark.parametrize("case", CASES)
def test_sparse_loss_and_every_gradient_equal_dense_autograd(case, loops):
    change, wanted = CASES[case]
    exact = leaves(torch.float64)
    change(exact)
    tensors = [t.detach().float().requires_grad_() for t in exact] if loops == "compiled" else exact
    expected, expected_gradients = loss_and_gradients(dense_loss, exact, wanted)
    workspace = Workspace()
    for _ in range(3):  # again with memory and a border that the step before left behind
        output, gradients = loss_and_gradients(sparse_loss, tensors, wanted, workspace)
        tolerance = {"rtol": 1e-4, "atol": 2e-5} if loops == "compiled" else {"rtol": 1e-9, "atol": 1e-12}
        for got, want in zip(output, expected, strict=True):
            torch.testing.assert_close(got, want, check_dtype=False, **tolerance)
        names = ("x", "y", *Weights._fields)[: len(gradients)]
        for name, got, want in zip(names, gradients, expected_gradients, strict=True):
            torch.testing.assert_close(got, want, check_dtype=False, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
            workspace.give(name, torch.full_like(got, float("nan")))  # what comes back must be written over
    assert len(expected.errors) == 3 and expected.loss > 0


def formulas(x, y, weights, wanted, scale):
    """The loss where the choice is a sort and JumpReLU's step has the slope of a ramp, for autograd; `scale` [tokens]
    multiplies residuals and penalties."""
    before, threshold = x @ weights.W_enc.T + weights.b_enc, weights.threshold
    rank = (before * (weights.W_dec.norm(dim=1) if wanted.by_contribution else 1)).detach()
    penalty = 0
    if wanted.activation == "jumprelu":
        ramp = ((before - threshold) / wanted.bandwidth + 0.5).clamp(0, 1)
        step = (before > threshold).double() + ramp - ramp.detach()
        a = before * step.detach() + threshold.detach() * (ramp - ramp.detach())
        penalty = wanted.l0_weight * sum(
            s * (row.sum() / wanted.k - 1) ** 2 for s, row in zip(scale, step, strict=True)
        )
    else:
        rows, k = (rank, wanted.k) if wanted.activation == "topk" else (rank.reshape(1, -1), wanted.num_entries)
        chosen = torch.zeros_like(rows)
        for row, keep in zip(rows, chosen, strict=True):
            for index in sorted(range(len(row)), key=lambda i: -row[i].item())[:k]:
                keep[index] = row[index] > 0
        a = before * chosen.view_as(before)
    residuals = [scale[:, None] * (y - weights.b_dec - a[:, :end] @ weights.W_dec[:end]) for end in wanted.ends]
    errors = [residual.square().sum() for residual in residuals]
    return sum(w * e for w, e in zip(wanted.weights, errors, strict=True)) + penalty, (a > 0).any(0)


@pytest.mark.parametrize("activation", [
    {"by_contribution": True}, TOPK, TOPK | {"by_contribution": True}, JUMP, JUMP | {"l0_weight": 0.0}
])  # fmt: skip
@pytest.mark.parametrize("bfloat16", [False, True])
def test_activations_and_every_gradient_equal_the_formulas(activation, bfloat16, loops):
    tensors, wanted = leaves(tokens=40), objective(count=120, **activation)
    tensors[4].data *= torch.linspace(0, 3, F).unsqueeze(1)
    tensors[6].data[0] = 90
    if loops == "compiled":
        tensors = [t.detach().float().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    scale = torch.ones(40, dtype=torch.float64)
    scale[3::7] = 0.2
    massive = PerToken(scale.to(tensors[0].dtype), scale == 1)
    loss, fired = formulas(exact[0], exact[1], Weights(*exact[2:]), wanted, scale)
    used = 7 if wanted.activation == "jumprelu" else 6
    expected = torch.autograd.grad(loss, exact[:used])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if loops == "compiled" else {"rtol": 1e-9, "atol": 1e-12}
    losses = [sparse_loss] if bfloat16 else [dense_loss, sparse_loss]
    for compute in losses:
        rest = () if compute is dense_loss else (Workspace(), bfloat16)
        output, gradients = loss_and_gradients(compute, tensors, wanted, *rest, massive)
        torch.testing.assert_close(output.loss, loss, check_dtype=False, **tolerance)
        assert torch.equal(output.fired, fired)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want, check_dtype=False, **tolerance)
    assert fired[0] == (activation is TOPK)


def test_rows_wider_than_the_loops_blocks(loops):
    """The compiled loops work through 512 columns at a time."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(8, 1100), (8, 1300), (30, 1100), (30,), (30, 1300), (1300,)]
    exact = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    tensors = [t.detach().float().requires_grad_() for t in exact]
    wanted = Objective((10, 30), (0.4, 0.6), 40, torch.tensor([2, 21]), 1, 0.1)
    expected, expected_gradients = loss_and_gradients(dense_loss, exact, wanted)
    output, gradients = loss_and_gradients(sparse_loss, tensors, wanted, Workspace())
    torch.testing.assert_close(output.errors, expected.errors, check_dtype=False, rtol=1e-5, atol=0)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_source_that_is_not_finite_is_noticed(loops):
    tensors = leaves(torch.float32)
    with torch.no_grad():
        tensors[0][4, 2] = float("nan")
    for loss, rest in ((dense_loss, ()), (sparse_loss, (Workspace(),))):
        _, gradients = loss_and_gradients(loss, tensors, objective(), *rest)
        assert gradients[2].isnan().any()


LOSSES = {"dense": dense_loss, "sparse": lambda *arguments: sparse_loss(*arguments, Workspace())}


@pytest.mark.parametrize("backend", LOSSES)
def test_gradients_equal_finite_differences(backend):
    assert gradcheck(lambda *t: LOSSES[backend](t[0], t[1], Weights(*t[2:]), objective()).loss, leaves(seed=3)[:6])


@pytest.mark.parametrize("backend", LOSSES)
def test_gradients_of_auxk_equal_finite_differences(backend):
    """The residual that dead features reconstruct is detached: only what acts through their own weights is compared."""
    tensors, dead = leaves(seed=3), [1, 17]
    wanted = objective(dead=dead, weights=(0.0, 0.0, 0.0))
    with torch.no_grad():
        tensors[3][dead] -= 20  # far from being selected, and negative
    is_dead = torch.zeros(F, dtype=torch.bool).scatter(0, torch.tensor(dead), True)

    def loss(*dead_weights):
        mixed = [torch.where(is_dead.view(-1, *[1] * (w.ndim - 1)), w, fixed.detach())
                 for w, fixed in zip(dead_weights, tensors[2:5], strict=True)]  # fmt: skip
        return LOSSES[backend](tensors[0], tensors[1], Weights(*mixed, tensors[5]), wanted).loss

    free = [t.detach().clone().requires_grad_() for t in tensors[2:5]]
    assert gradcheck(loss, free)
    assert all(g[dead].abs().sum() > 0 for g in torch.autograd.grad(loss(*free), free))


def test_bfloat16_product_chooses_and_computes_what_float32_does(loops):
    generator = torch.Generator().manual_seed(1)
    x, W_enc = torch.randn(200, 64, generator=generator), torch.randn(300, 64, generator=generator) / 8
    y, W_dec = torch.randn(200, 16, generator=generator), torch.randn(300, 16, generator=generator)
    tensors = [x, y, W_enc, torch.zeros(300), W_dec, torch.zeros(16)]
    tensors = [t.requires_grad_() for t in tensors]
    wanted = Objective((100, 300), (0.5, 0.5), 8 * 200, torch.arange(290, 300), 3, 0.1)
    exact, exact_gradients = loss_and_gradients(sparse_loss, tensors, wanted, Workspace())
    output, gradients = loss_and_gradients(sparse_loss, tensors, wanted, Workspace(), True)
    assert torch.equal(output.fired, exact.fired) and output.num_active == exact.num_active
    torch.testing.assert_close(output.errors, exact.errors, rtol=1e-5, atol=0)
    for got, want in zip(gradients[2:], exact_gradients[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2 * float(want.abs().max()))


def test_what_a_gpu_runs_chooses_the_same_entries():
    """The branch without waiting for the host, run on a CPU: the same entries, padded with zeros where too few."""
    z = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    z[:, ::2] = z[:, ::2].round()  # ties
    z[-1, -1] = float("inf")
    z[3, 3] = float("nan")
    for count in (1, 77, 400, 2000):
        chosen = selection._largest_gpu(z, count)
        expected, _ = selection._largest_cpu(z, count, 0.0)
        real = chosen.value > 0
        assert len(chosen.value) == count and (chosen.value[~real] == 0).all()
        for got, want in zip(chosen, expected, strict=True):
            assert torch.equal(got[real], want)


@pytest.mark.parametrize("count", [1, 2, 57, 400, 5000])
def test_kth_largest_is_exact(count):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(count)) * 10
    values[:50] = 0.0
    values[50:60] = 1e-41  # denormal
    positive = values[values > 0].sort(descending=True).values
    expected = positive[count - 1].item() if count <= len(positive) else 0.0
    on_gpu, *_ = _border(_largest_values(values, count), count)
    assert _by_histogram(values, count).item() == on_gpu.item() == expected


def test_ties_go_by_position_and_zeros_are_never_chosen():
    z = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, 0.0, 3.0, 1.0])
    mask, border = keep_largest(z, 4)
    assert mask.tolist() == [False, True, True, True, False, False, True, False]
    assert border == 1.0
    assert keep_largest(z, 8)[0].tolist() == (z > 0).tolist()
    assert not keep_largest(torch.zeros(9), 2)[0].any()


def test_the_guessed_border_never_changes_the_choice():
    z = torch.randn(30, 20, generator=torch.Generator().manual_seed(4))
    order = z.flatten().argsort(descending=True)[:60].sort().values
    for guess in (0.0, 0.1, 1.0, 2.0, 50.0):
        chosen, border = selection.largest_entries(z, 60, guess)
        assert torch.equal(chosen.token * 20 + chosen.feature, order)
        assert border == z.flatten()[order].min().item() == chosen.value.min().item()


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_loops_do_not_depend_on_threads(set_threads):
    if native.load() is None:
        pytest.skip(native.status())
    generator = torch.Generator().manual_seed(0)
    table, weight = torch.randn(500, 700, generator=generator), torch.randn(3000, generator=generator)
    index = torch.randint(500, (3000,), generator=generator)
    offsets = torch.randint(3001, (99,), generator=generator).sort().values
    results = []
    for number in (1, 2, 3):
        set_threads(number)
        results.append(kernels.bag_sums(table, index, weight, kernels.Bags(offsets)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_gradient_of_thresholds_does_not_depend_on_threads(set_threads):
    """At as many entries as torch adds up in parallel."""
    generator = torch.Generator().manual_seed(0)
    entries, tokens = 200_000, 2_000
    value, feature = torch.rand(entries, generator=generator), torch.randint(50, (entries,), generator=generator)
    token = torch.arange(tokens).repeat_interleave(entries // tokens)
    gradients = []
    for number in [1, *[2] * 30]:
        set_threads(number)
        weights = Weights(*[torch.zeros(50)] * 4, threshold=torch.full((50,), 0.5, requires_grad=True))
        wanted = objective(**JUMP | {"bandwidth": 2.0})
        value_, penalty = ACTIVATIONS["jumprelu"].sparse(value, token, feature, tokens, weights, wanted)
        gradients += torch.autograd.grad((value_ * value).sum() + penalty.sum(), weights.threshold)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CC": "/nonexistent/cc"}, "no C compiler"),
        ({"CC": "false"}, "compilation failed"),
        ({"MTC_NATIVE": "0"}, "=0"),
    ],
)
def test_without_a_compiler_torch_does_the_work_and_says_so(environment, reason, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    native._build.cache_clear()
    try:
        assert native.load() is None
        assert reason in native.status()
    finally:
        native._build.cache_clear()


def test_memory_is_guarded_under_python_O_too():
    """Raw pointers say nothing of strides, types or lengths."""
    if native.load() is None:
        pytest.skip(native.status())
    code = """
import torch
from mtc.transcoder import native, products, sparse_loss
from mtc.transcoder.objective import Objective, Weights
from mtc.transcoder.products import Workspace

def refused(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)

table, counts = torch.ones(4, 6), torch.zeros(6, dtype=torch.int64)
for wrong in (table.T, table.double(), table.to("meta")):
    print(refused(native.call, "count_above", wrong, 6, 4, 0.5, counts))
x, index = torch.ones(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
print(refused(products.entry_dots, x.T.contiguous().T, index, x, index))
weights = Weights(torch.ones(6, 4), torch.ones(6), torch.ones(6, 4), torch.ones(4))
wanted = Objective((2, 4, 6), (1.0,), 3, index[:0], 1, 0.1)
print(refused(sparse_loss.sparse_loss, x.float(), x.float(), weights, wanted, Workspace()))
native.load = lambda: None
print(refused(native.call, "count_above", table, 4, 6, 0.5, counts))
"""
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    for line, told in zip(
        lines,
        ("strides [1, 6]", "float64", "on meta", "contiguous", "1 weights for 3 prefixes", "not compiled"),
        strict=True,
    ):
        assert told in line, done.stdout + done.stderr
