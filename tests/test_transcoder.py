"""The transcoder against a dense reference written from the formulas, and against sorting."""

import pytest
import torch

from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape, batch_topk_mask, kth_largest

GROUPS, K, D_SOURCE, D_TARGET = (6, 10, 8), 3, 7, 5
F = sum(GROUPS)


def random_transcoder(input_norm="rms", dtype=torch.float32):
    transcoder = MatryoshkaTranscoder(TranscoderShape(D_SOURCE, D_TARGET, GROUPS, K, input_norm), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=generator)
        transcoder.b_enc.normal_(generator=generator)
        transcoder.b_dec.normal_(generator=generator)
        transcoder.target_scale.fill_(0.7)
        transcoder.input_scale.fill_(1.3)
    return transcoder


def data(tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D_SOURCE, generator=generator) * 3
    return x, torch.randn(tokens, D_TARGET, generator=generator)


def reference_loss(t, x, y, dead, aux_k, coefficient):
    """From the formulas, token by token, with a full sort for the selection."""
    if t.shape.input_norm == "rms":
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    elif t.shape.input_norm == "scalar":
        x = x * t.input_scale
    z = torch.relu(x @ t.W_enc.T + t.b_enc)
    order = sorted(range(z.numel()), key=lambda i: (-z.flatten()[i].item(), i))[: K * len(x)]
    keep = torch.zeros(z.numel())
    keep[order] = 1
    a = z * keep.view_as(z)
    y = y * t.target_scale
    losses, end = [], 0
    for size in GROUPS:
        end += size
        y_m = sum((a[:, j : j + 1] * t.W_dec[j] for j in range(end)), t.b_dec.expand(len(x), -1))
        losses.append(((y - y_m) ** 2).sum(1).mean() / D_TARGET)
    loss = sum(losses) / len(losses)
    index = dead.nonzero().flatten().tolist()
    if index:
        residual = (y - y_m).detach()
        total = 0.0
        for row in range(len(x)):
            strongest = sorted(index, key=lambda j: -z[row, j].item())[:aux_k]
            e_hat = sum(z[row, j] * t.W_dec[j] for j in strongest)
            total = total + ((residual[row] - e_hat) ** 2).sum() / D_TARGET
        loss = loss + coefficient * total / len(x)
    return loss, losses


@pytest.mark.parametrize("input_norm", ["rms", "scalar", "none"])
@pytest.mark.parametrize("num_dead", [0, 2, 9])
def test_loss_and_all_gradients_equal_the_formulas(input_norm, num_dead):
    t = random_transcoder(input_norm)
    x, y = data()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.arange(num_dead) * 2 + 1] = True
    output = t(x, y, 4, 0.25, dead)
    gradients = torch.autograd.grad(output.loss, list(t.parameters()))
    expected, prefix_errors = reference_loss(t, x, y, dead, 4, 0.25)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.prefix_errors, torch.stack(prefix_errors).detach())
    for got, want in zip(gradients, torch.autograd.grad(expected, list(t.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 57, 400, 5000])
def test_kth_largest_is_exact(count):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(count)) * 10
    positive = values[values > 0].sort(descending=True).values
    expected = positive[count - 1].item() if count <= len(positive) else 0.0
    assert kth_largest(values, count) == expected


def test_batch_topk_breaks_ties_by_position_and_never_takes_zeros():
    z = torch.tensor([[0.0, 2.0, 1.0, 1.0], [1.0, 0.0, 3.0, 1.0]])
    mask = batch_topk_mask(z, 4)
    assert mask.tolist() == [[False, True, True, True], [False, False, True, False]]
    assert batch_topk_mask(z, 8).tolist() == (z > 0).tolist()
    assert not batch_topk_mask(torch.zeros(3, 3), 2).any()


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
        for i, m in enumerate(t.prefixes):
            torch.testing.assert_close(t.encode(x, m), a[:, :m])
            torch.testing.assert_close(t.decode_prefixes(a)[i], t.decode(a[:, :m]))
    with pytest.raises(ValueError, match=r"prefix=5 .*\[6, 16, 24\]"):
        t.encode(x, 5)


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


def test_weights_file_round_trip_and_refusals(tmp_path):
    t = random_transcoder("scalar")
    t.threshold.fill_(0.5)
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
