"""Held-out metrics against direct computations on whole tensors, through a real random language model."""

import numpy as np
import pytest
import torch

from mtc.config import load_preset
from mtc.evaluation import evaluate, loss_sums, reconstruction_sums
from mtc.language_model import LanguageModel
from mtc.tokens import PaddedWindows
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape


@pytest.fixture(scope="module")
def transcoder():
    transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 32, 16), 8, "rms"), seed=1)
    with torch.no_grad():
        transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        transcoder.threshold.fill_(1.2)
        transcoder.target_scale.fill_(0.8)
    return transcoder


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 20, dtype=torch.bool)
    mask[2, 13:] = False
    trainable = mask.clone()
    trainable[:, 0] = False
    return PaddedWindows(ids, mask, trainable)


def test_fvu_and_l0_equal_a_direct_computation_in_any_partition(transcoder):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(500, 32, generator=generator), torch.randn(500, 32, generator=generator) + 30
    parts = [reconstruction_sums(transcoder, x[i : i + 90], y[i : i + 90])[0] for i in range(0, 500, 90)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    evaluation = total.evaluation(transcoder, None)
    a = transcoder.encode(x).detach()
    for i, m in enumerate(transcoder.prefixes):
        y_m = transcoder.decode(a[:, :m]).detach().double()
        expected = (y.double() - y_m).square().sum() / (y.double() - y.double().mean(0)).square().sum()
        assert evaluation.fvu[i] == pytest.approx(expected.item(), rel=1e-6)
        assert evaluation.l0[i] == pytest.approx((a[:, :m] > 0).sum(1).float().mean().item())
    assert evaluation.never_fired == int((a > 0).sum(0).eq(0).sum())
    np.testing.assert_allclose(total.target_mean(), y.mean(0), rtol=1e-5)


def test_losses_equal_a_model_whose_mlp_is_replaced_by_hand(transcoder, batch):
    config = load_preset("tiny").model
    model = LanguageModel(config, full=True)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    losses = loss_sums(model, transcoder, batch, mean).loss_recovered()
    hf = model.model
    layer = hf.model.layers[config.layer]
    predicted = batch.trainable[:, 1:]

    def run(change):
        """Plain transformers, with a hook on the last module of the MLP block."""
        seen = {}
        hooks = [
            layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, a: seen.update(source=a[0])),
            layer.post_feedforward_layernorm.register_forward_hook(
                lambda m, a, out: torch.where(batch.trainable[..., None], change(seen["source"], out), out)
            ),
        ]
        with torch.no_grad():
            logits = hf(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(logits[:, :-1][predicted].float(), -1)

    def ce(log_p):
        return torch.nn.functional.nll_loss(log_p, batch.input_ids[:, 1:][predicted]).item()

    clean, zero = run(lambda s, out: out), run(lambda s, out: torch.zeros_like(out))
    averaged = run(lambda s, out: mean.expand_as(out))
    assert losses.tokens == int(predicted.sum())
    assert losses.ce_clean == pytest.approx(ce(clean), rel=1e-5)
    assert losses.ce_zero == pytest.approx(ce(zero), rel=1e-5)
    assert losses.ce_mean == pytest.approx(ce(averaged), rel=1e-5)
    for i, m in enumerate(transcoder.prefixes):
        spliced = run(lambda s, out, m=m: transcoder.reconstruct(s.flatten(0, 1), m).view_as(out))
        kl = torch.nn.functional.kl_div(spliced, clean, log_target=True, reduction="batchmean").item()
        assert losses.ce_spliced[i] == pytest.approx(ce(spliced), rel=1e-5)
        assert losses.kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        expected = (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean))
        assert losses.recovered_zero[i] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_evaluate_joins_both_and_refuses_nothing(transcoder, batch):
    config = load_preset("tiny")
    evaluation = evaluate(config, transcoder, [batch], [batch])
    pair = LanguageModel(config.model).capture(batch.input_ids, batch.attention_mask)
    x, y = pair.source[batch.trainable], pair.target[batch.trainable]
    expected = (y - transcoder.reconstruct(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert evaluation.fvu[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert evaluation.tokens == int(batch.trainable.sum())
    assert evaluation.loss is not None
    with pytest.raises(ValueError, match="no held-out windows"):
        evaluate(config, transcoder, [], [])
