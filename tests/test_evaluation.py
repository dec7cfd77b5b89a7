"""Held-out metrics against direct computations on whole tensors, through a real random language model."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mtc.config import load_preset
from mtc.evaluation import evaluate, loss_sums, reconstruction_sums
from mtc.language_model import LanguageModel
from mtc.model_files import prepare_model
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
from mtc.work import PackedWindows, pack_windows


@pytest.fixture(scope="module")
def transcoder():
    transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 32, 16), 8, "rms"), seed=1)
    with torch.no_grad():
        transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        transcoder.threshold.fill_(1.2)
        transcoder.target_scale.fill_(0.8)
    return transcoder


LENGTHS = (20, 20, 13, 20, 1, 7)
BOS = 256


@pytest.fixture(scope="module")
def windows() -> PackedWindows:
    rng = np.random.default_rng(0)
    return pack_windows([np.r_[BOS, rng.integers(0, 256, n - 1)].astype(np.int32) for n in LENGTHS], [BOS])


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

    worse_x, worse_y = (torch.cat([rows, rows[:2]]) for rows in (x, y))
    worse_x[500, 3], worse_y[501, 5] = math.inf, math.nan
    without, activations = reconstruction_sums(transcoder, worse_x, worse_y)
    assert without.evaluation(transcoder, None).fvu == pytest.approx(evaluation.fvu, rel=1e-9)
    assert float(without.tokens) == 500
    assert not activations[500:].any()
    torch.testing.assert_close(activations[:500], a)


@pytest.mark.parametrize("at_once", [1 << 26, 259 * 25])
def test_losses_equal_a_model_whose_mlp_is_replaced_by_hand(transcoder, windows, at_once, monkeypatch):
    """Two layers at once, the second one by plain transformers with hooks; also cut into parts of few logits."""
    monkeypatch.setattr("mtc.evaluation.MAX_LOGITS", at_once)
    config = load_preset("tiny", {"model": {"layers": [2, 1]}}).model
    model = LanguageModel(config, full=True)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    other, found = loss_sums(model, [transcoder, transcoder], windows, [mean, mean])
    losses = found.loss_recovered()
    hf = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()
    layer = hf.model.layers[1]

    def run(change):
        """One window at a time, with a hook on the last module of the MLP block."""
        seen = {}

        def after(module, args, out):
            changed = change(seen["source"], out)
            changed[:, 0] = out[:, 0]  # BOS
            return changed

        hooks = [
            layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, a: seen.update(source=a[0])),
            layer.post_feedforward_layernorm.register_forward_hook(after),
        ]
        with torch.no_grad():
            logits = [hf(ids[None]).logits[0, :-1] for ids in windows.input_ids.split(LENGTHS)]
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(torch.cat(logits).float(), -1)

    labels = torch.cat([ids[1:] for ids in windows.input_ids.split(LENGTHS)])

    def ce(log_p):
        return torch.nn.functional.nll_loss(log_p, labels).item()

    clean, zero = run(lambda s, out: out.clone()), run(lambda s, out: torch.zeros_like(out))
    averaged = run(lambda s, out: mean.expand_as(out).clone())
    assert losses.tokens == len(labels)
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
    assert other.loss_recovered().ce_clean == losses.ce_clean
    assert abs(other.loss_recovered().ce_zero - losses.ce_zero) > 1e-3


def test_evaluate_joins_both_and_refuses_nothing(transcoder, windows):
    config = load_preset("tiny")
    evaluation = evaluate(config, transcoder, [windows], [windows])
    (pair,) = LanguageModel(config.model).capture(windows)
    x, y = pair.source[windows.trainable], pair.target[windows.trainable]
    expected = (y - transcoder.reconstruct(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert evaluation.fvu[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert evaluation.tokens == int(windows.trainable.sum())
    assert evaluation.loss is not None
    with pytest.raises(ValueError, match="no held-out windows"):
        evaluate(config, transcoder, [], [])
