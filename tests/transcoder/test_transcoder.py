"""The transcoder against a dense reference written from the formulas, and against sorting."""

import math

import numpy as np
import pytest
import torch

from mtc.transcoder import Compute, MatryoshkaTranscoder, Objective, TranscoderShape, Workspace

GROUPS, K, D_SOURCE, D_TARGET = (6, 10, 8), 3, 7, 5
F = sum(GROUPS)


def random_transcoder(input_norm="rms", skip=False, activation="batch_topk", rank="activation"):
    shape = TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, input_norm, skip, activation, rank)
    transcoder = MatryoshkaTranscoder(shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=generator)
        transcoder.b_enc.normal_(generator=generator)
        transcoder.b_dec.normal_(generator=generator)
        if transcoder.W_skip is not None:
            transcoder.W_skip.normal_(generator=generator)
        transcoder.target_scale.fill_(0.7)
        transcoder.input_scale.fill_(1.3)
    return transcoder


def data(tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D_SOURCE, generator=generator) * 3
    return x, torch.randn(tokens, D_TARGET, generator=generator)


def reference_loss(t, x, y, dead, aux_k, coefficient, limit=math.inf):
    """From the formulas, token by token, with a full sort for the selection; a target longer than `limit` has the
    weight of one of that length."""
    w = torch.tensor([min(1.0, limit / y_t.norm().item()) ** 2 for y_t in y])
    if t.shape.input_norm == "rms":
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    elif t.shape.input_norm == "scalar":
        x = x * t.input_scale
    before = x @ t.W_enc.T + t.b_enc
    z = torch.relu(before)
    order = sorted(range(z.numel()), key=lambda i: (-z.flatten()[i].item(), i))[: K * len(x)]
    keep = torch.zeros(z.numel())
    keep[order] = 1
    a = z * keep.view_as(z)
    y = y * t.target_scale
    base = t.b_dec.expand(len(x), -1) + (0 if t.W_skip is None else x @ t.W_skip.T)
    losses, errors, end = [], [], 0
    for size in GROUPS:
        end += size
        y_m = sum((a[:, j : j + 1] * t.W_dec[j] for j in range(end)), base)
        squares = ((y - y_m) ** 2).sum(1) / D_TARGET
        losses.append((w * squares).mean())
        errors.append(((w == 1) * squares).mean())
    loss = sum(losses) / len(losses)
    index = dead.nonzero().flatten().tolist()
    if index:
        residual = (y - y_m).detach()
        total = 0.0
        for row in range(len(x)):
            strongest = sorted(index, key=lambda j: -before[row, j].item())[:aux_k]
            e_hat = sum(before[row, j] * t.W_dec[j] for j in strongest)
            total = total + w[row] * ((residual[row] - e_hat) ** 2).sum() / D_TARGET
        loss = loss + coefficient * total / len(x)
    return loss, errors


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("input_norm", "num_dead", "limit"), [("rms", 0, 2.0), ("scalar", 2, math.inf), ("none", 9, 2.0)]
)
def test_loss_and_all_gradients_equal_the_formulas(backend, skip, input_norm, num_dead, limit):
    t = random_transcoder(input_norm, skip)
    x, y = data()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.arange(num_dead) * 2 + 1] = True
    mean = 1 / (len(x) * D_TARGET)
    objective = Objective(t.prefixes, (mean / 3,) * 3, K * len(x), dead.nonzero().squeeze(1), 4, 0.25 * mean)
    if limit < math.inf:
        objective = objective._replace(cap_massive=True)
        t.massive_norm.fill_(limit)
        assert 0 < t.massive(y).sum() < len(y)
    output = t(x, y, objective, Compute(backend), Workspace())
    gradients = torch.autograd.grad(output.loss, list(t.parameters()))
    expected, prefix_errors = reference_loss(t, x, y, dead, 4, 0.25, limit)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.errors * mean, torch.stack(prefix_errors).detach())
    for got, want in zip(gradients, torch.autograd.grad(expected, list(t.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_inference_uses_the_threshold_and_raw_units():
    t = random_transcoder("rms")
    x, _ = data()
    with pytest.raises(ValueError, match="not calibrated"):
        t.encode(x)
    t.threshold.fill_(0.9)
    with torch.no_grad():
        z = torch.relu(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() @ t.W_enc.T + t.b_enc)
        a = torch.where(z > 0.9, z, torch.zeros(()))
        torch.testing.assert_close(t.encode(x), a)
        torch.testing.assert_close(t.reconstruct(x), (a @ t.W_dec + t.b_dec) / 0.7)
        for m in t.prefixes:
            torch.testing.assert_close(t.encode(x, m), a[:, :m])
            torch.testing.assert_close(t.decode(a[:, :m]), (a[:, :m] @ t.W_dec[:m] + t.b_dec) / 0.7)
    with pytest.raises(ValueError, match=r"prefix=5 .*\[6, 16, 24\]"):
        t.encode(x, 5)


def test_skip_connection_is_part_of_every_reconstruction():
    t = random_transcoder("rms", skip=True)
    x, _ = data()
    t.threshold.fill_(0.9)
    with torch.no_grad():
        straight = t.normalise(x) @ t.W_skip.T
        for m in t.prefixes:
            a = t.encode(x, m)
            expected = (a @ t.W_dec[:m] + straight + t.b_dec) / 0.7
            torch.testing.assert_close(t.reconstruct(x, m), expected)
        with pytest.raises(ValueError, match="skip connection"):
            t.decode(t.encode(x))


def test_initialisation_centres_pre_activations_and_targets():
    t = MatryoshkaTranscoder(TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, "rms"))
    x, y = data(5000)
    x, y = x + 4, y * 5 - 2
    t.initialise(x, y)
    scaled = y * t.target_scale
    assert scaled.square().sum(1).mean().item() == pytest.approx(D_TARGET, rel=1e-5)
    torch.testing.assert_close(t.b_dec.detach(), scaled.mean(0), rtol=1e-4, atol=1e-5)
    before_relu = t.normalise(x) @ t.W_enc.T + t.b_enc
    assert before_relu.mean(0).abs().max().item() < 1e-4
    assert not t.W_dec.any()
    centred = t.normalise(x) - t.normalise(x).mean(0)
    nearest = t.W_enc @ (centred / centred.norm(dim=1, keepdim=True)).T
    assert nearest.max(1).values.min().item() == pytest.approx(1, abs=1e-5)  # each row is a centred source
    assert len(nearest.argmax(1).unique()) == F
    norms = np.linalg.norm(y.numpy().astype(np.float64), axis=1)
    assert float(t.massive_norm) == pytest.approx(5 * np.median(norms), rel=1e-3)


def test_massive_tokens_are_those_far_above_the_median_norm():
    t = MatryoshkaTranscoder(TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, "rms"))
    x, y = data(1001)
    planted = torch.arange(0, 1001, 97)
    y[planted] *= 40
    assert not t.massive(y).any(), "nothing is massive where the norm is not known"
    t.initialise(x, y)
    assert t.massive(y).nonzero().squeeze(1).tolist() == planted.tolist()
    old = {name: value for name, value in t.state_dict().items() if name != "massive_norm"}
    t.load_state_dict(old)
    assert t.massive_norm.isnan(), "older weights do not know it"


def test_no_row_starts_as_a_copy_or_at_a_massive_token():
    t = MatryoshkaTranscoder(TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, "rms"))
    x, y = data(2000)
    x[::2], x[1::20] = x[0], 50 * torch.eye(D_SOURCE)[0]  # half of the tokens are the same; others are massive
    y[1::20] *= 40
    directions = torch.stack([*torch.eye(D_SOURCE)[1:4], 2.1 * torch.eye(D_SOURCE)[2]])  # the last is a copy
    x[3] = 10 * directions[0] + x[~t.massive(y)].mean(0)  # a token that is a copy of a direction
    t.initialise(x, y, directions=directions)
    W_enc = t.W_enc.detach()
    cosines = W_enc @ W_enc.T - torch.eye(F)
    assert cosines.max() < 0.95
    torch.testing.assert_close(W_enc[:3], directions[:3])
    usual = t.normalise(x[~t.massive(y)])
    torch.testing.assert_close(t.b_enc.detach(), -W_enc @ usual.mean(0), rtol=1e-4, atol=1e-5)
    assert (t.target_scale**2 * y[~t.massive(y)].square().sum(1).mean()).item() == pytest.approx(D_TARGET, rel=1e-5)
    t.initialise(x, y, with_massive=True)
    assert (t.target_scale**2 * y.square().sum(1).mean()).item() == pytest.approx(D_TARGET, rel=1e-5)


def test_initialisation_from_few_rows_makes_no_two_features_equal():
    t = MatryoshkaTranscoder(TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, "rms"))
    t.initialise(*data(5))
    assert len(t.W_enc.detach().round(decimals=4).unique(dim=0)) == F
    torch.testing.assert_close(t.W_enc.norm(dim=1), torch.ones(F))


def test_weights_file_round_trip_and_refusals(tmp_path):
    t = random_transcoder("scalar")
    t.threshold.fill_(0.5)
    t.massive_norm.fill_(70)
    t.tokens_since_fired += torch.arange(F)
    path = tmp_path / "t.safetensors"
    path.write_bytes(t.to_bytes())
    again = MatryoshkaTranscoder.load(str(path))
    assert again.shape == t.shape
    for name, tensor in t.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    path.write_bytes(t.to_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors"):
        MatryoshkaTranscoder.load(str(path))
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="mtc-transcoder"):
        MatryoshkaTranscoder.load(str(path))


@pytest.mark.parametrize(("input_norm", "skip"), [("rms", False), ("scalar", True), ("none", False)])
def test_sparse_codes_are_the_dense_activations(input_norm, skip):
    t = random_transcoder(input_norm, skip)
    x, _ = data(tokens=50)
    t.threshold.fill_(0.4)
    codes, dense = t.encode_sparse(x), t.encode(x).detach()
    filled = torch.zeros_like(dense).index_put((codes.token, codes.feature), codes.value.detach())
    torch.testing.assert_close(filled, dense)
    assert len(codes.value) == int((dense > 0).sum()) > 50
    for prefix in t.prefixes:
        part = t.encode_sparse(x, prefix=prefix)
        torch.testing.assert_close(part.value, codes.value[codes.feature < prefix])
        assert part.feature.tolist() == codes.feature[codes.feature < prefix].tolist()
    torch.testing.assert_close(
        t.decode_codes(codes, x).detach(), torch.stack([t.decode(dense[:, :m], x) for m in t.prefixes]).detach()
    )
    t.threshold.fill_(-1.0)  # nothing below 0 ever fires
    assert len(t.encode_sparse(x).value) == int((t.encode(x) > 0).sum())
    none = t.encode_sparse(x[:0])
    assert t.decode_codes(none, x[:0]).shape == (3, 0, D_TARGET)
    t.threshold.fill_(1e9)
    torch.testing.assert_close(t.decode_codes(t.encode_sparse(x), x)[2], t.decode(torch.zeros_like(dense), x))


def test_a_search_in_bfloat16_finds_every_entry():
    """Hundreds of entries lie within bfloat16's rounding of the threshold."""
    generator = torch.Generator().manual_seed(0)
    t = MatryoshkaTranscoder(TranscoderShape(64, 5, (300, 212), 3, "rms"), seed=1)
    with torch.no_grad():
        t.b_enc.normal_(std=3, generator=generator)
        t.W_enc.mul_(torch.rand(512, 1, generator=generator) * 3)
    x = torch.randn(3000, 64, generator=generator)
    for threshold in (torch.tensor(0.7), torch.rand(512, generator=generator) * 3):
        t.threshold = threshold
        exact, searched = t.encode_sparse(x), t.encode_sparse(x, bfloat16_search=True)
        z = t.pre_activations(x)
        near = (z - threshold).abs() < 1e-5  # float32 sums in another order
        assert ((z - threshold).abs() < 2**-8 * z).sum() > 500
        for codes in (exact, searched):
            found = torch.zeros_like(z, dtype=torch.bool)
            found[codes.token, codes.feature] = True
            assert torch.equal(found | near, (z > threshold) | near)
        torch.testing.assert_close(searched.value.sum(), exact.value.sum(), rtol=1e-5, atol=0)


def test_each_feature_may_have_a_threshold_of_its_own(tmp_path):
    t = random_transcoder("rms")
    x, _ = data()
    t.threshold = torch.linspace(0.1, 1.5, F)
    path = tmp_path / "t.safetensors"
    path.write_bytes(t.to_bytes())
    again = MatryoshkaTranscoder.load(str(path))
    with torch.no_grad():
        z = torch.relu(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() @ t.W_enc.T + t.b_enc)
        expected = torch.stack([torch.where(z[:, j] > 0.1 + 1.4 * j / (F - 1), z[:, j], 0.0) for j in range(F)], dim=1)
        torch.testing.assert_close(again.encode(x), expected)
        torch.testing.assert_close(again.encode(x, 16), expected[:, :16])
        torch.testing.assert_close(again.encode_some(x, [F - 1, 3]), expected[:, [F - 1, 3]])
        codes = again.encode_sparse(x)
        filled = torch.zeros_like(expected).index_put((codes.token, codes.feature), codes.value)
        torch.testing.assert_close(filled, expected)
    t.threshold = torch.ones(F - 1)
    path.write_bytes(t.to_bytes())
    with pytest.raises(RuntimeError, match="threshold"):
        MatryoshkaTranscoder.load(str(path))


@pytest.mark.parametrize("rank", ["activation", "contribution"])
def test_topk_has_the_k_largest_of_each_token_at_inference_too(tmp_path, rank):
    t = random_transcoder(activation="topk", rank=rank)
    with torch.no_grad():
        t.W_dec[4] = 0
        t.b_enc[:] -= 2  # fewer than k are positive on some tokens
    (tmp_path / "t").write_bytes(t.to_bytes())
    t = MatryoshkaTranscoder.load(str(tmp_path / "t"))
    x, _ = data(tokens=150)
    with torch.no_grad():
        z = torch.relu(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() @ t.W_enc.T + t.b_enc)
        expected = torch.zeros_like(z)
        for row, out in zip(z, expected, strict=True):
            order = row * t.W_dec.norm(dim=1) if rank == "contribution" else row
            for j in sorted(range(F), key=lambda j: -order[j].item())[:K]:
                out[j] = row[j] if order[j] > 0 else 0
        assert 0 < ((expected > 0).sum(1) < K).sum() < 150
        torch.testing.assert_close(t.encode_some(x, [9, 3]), expected[:, [9, 3]])
        for m in (F, *t.prefixes):
            torch.testing.assert_close(t.encode(x, m), expected[:, :m])
            for search in (False, True):
                codes = t.encode_sparse(x, search, m)
                found = torch.zeros_like(z).index_put((codes.token, codes.feature), codes.value)
                torch.testing.assert_close(found[:, :m], expected[:, :m])
                assert (codes.value > 0).all() and (codes.feature < m).all()


def test_thresholds_that_are_trained_are_saved_with_the_weights(tmp_path):
    t = random_transcoder(activation="jumprelu")
    with pytest.raises(ValueError, match="not calibrated"):
        t.encode(data()[0])
    with torch.no_grad():
        t.threshold.copy_(torch.linspace(-0.1, 1.5, F))
    t.project()
    assert t.threshold.min() == 0
    (tmp_path / "t").write_bytes(t.to_bytes())
    again = MatryoshkaTranscoder.load(str(tmp_path / "t"))
    x, _ = data()
    with torch.no_grad():
        z = torch.relu(x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() @ t.W_enc.T + t.b_enc)
        torch.testing.assert_close(again.encode(x), torch.where(z > t.threshold, z, 0.0))
        codes = again.encode_sparse(x, True)
    torch.testing.assert_close(codes.value.sum(), again.encode(x).sum().detach())


def test_weights_are_float32_whatever_the_default(tmp_path):
    """Which transformers changes for the whole process, while another thread loads a model."""
    expected = random_transcoder(skip=True)
    expected.threshold.fill_(0.5)
    expected.massive_norm.fill_(70)
    (tmp_path / "weights").write_bytes(expected.to_bytes())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [random_transcoder(skip=True), MatryoshkaTranscoder.load(str(tmp_path / "weights"))]
    finally:
        torch.set_default_dtype(torch.float32)
    for transcoder in found:
        for name, tensor in transcoder.state_dict().items():
            assert tensor.dtype == expected.state_dict()[name].dtype, name
    for name, tensor in found[1].state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
