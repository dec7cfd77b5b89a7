"""Direct effects on logits against the derivative of the real model's final norm and unembedding."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mtc.analysis import logit_effects
from mtc.analysis.loss_sums import loss_sums
from mtc.config import load_preset
from mtc.language_model import LanguageModel, pack_windows, prepare_model
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

FINAL_NORMS = {
    "gemma2": "model.norm", "gemma3": "model.norm", "llama": "model.norm", "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
}  # fmt: skip


@pytest.mark.parametrize("architecture", FINAL_NORMS)
def test_effects_are_the_derivative_of_the_logits(architecture):
    """Along a direction that changes neither the mean nor the length of the residual, the norm is linear."""
    config = load_preset("tiny", {"model": {"name": f"random:{architecture}", "dtype": "float32"}}).model
    model = LanguageModel(config, full=True)
    hf = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()
    norm, head = hf.get_submodule(FINAL_NORMS[architecture]), hf.get_output_embeddings()
    with torch.no_grad():
        norm.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        model.model.get_submodule(FINAL_NORMS[architecture]).weight.copy_(norm.weight)
    d = model.d_model
    h, directions = torch.randn(2, d, generator=torch.Generator().manual_seed(1)).split(1)
    h, direction = h[0] * 5, directions[0]
    direction = direction - direction.mean()
    around = h - h.mean()
    direction = direction - around * (direction @ around) / (around @ around)
    if not isinstance(norm, torch.nn.LayerNorm):  # its rms is around zero
        direction = directions[0] - h * (directions[0] @ h) / (h @ h)
    _, derivative = torch.func.jvp(lambda x: head(norm(x[None]))[0], (h,), (direction,))

    transcoder = MatryoshkaTranscoder(TranscoderShape(d, d, (2, 1), 1, "none"))
    with torch.no_grad():
        transcoder.W_dec.copy_(torch.stack([direction, -2 * direction, torch.zeros(d)]))
        transcoder.target_scale.fill_(0.5)
    centre = h if not isinstance(norm, torch.nn.LayerNorm) else around
    scale = 1 / centre.square().mean().sqrt()
    found = logit_effects(model, transcoder, 0, 3).scaled(scale.item())
    expected = (derivative - derivative.mean()) / 0.5
    top = expected.topk(10)
    torch.testing.assert_close(torch.from_numpy(found.positive[0]), top.values, rtol=1e-4, atol=1e-6)
    assert found.positive_ids[0].tolist() == top.indices.tolist()
    low = expected.topk(10, largest=False)
    torch.testing.assert_close(torch.from_numpy(found.negative[0]), low.values, rtol=1e-4, atol=1e-6)
    assert found.negative_ids[1].tolist() == top.indices.tolist()  # the opposite direction
    np.testing.assert_allclose(found.negative[1], -2 * found.positive[0], rtol=1e-4)
    assert not found.positive[2].any()
    most = expected.abs().max().item()
    for row, sign in ((0, 1), (1, -1)):
        counts, _ = np.histogram(sign * expected.detach().numpy(), found.counts.shape[1], (-most, most))
        assert np.abs(found.counts[row] - counts).sum() <= 4, "but for what lies on a border"
        assert found.counts[row].sum() == len(expected)
    assert found.counts[2].max() == found.counts[2].sum() == len(expected)


def test_the_norms_factor_is_the_one_of_the_predicting_tokens():
    config = load_preset("tiny", {"model": {"dtype": "float32"}}).model
    model = LanguageModel(config, full=True)
    rng = np.random.default_rng(0)
    rows = [np.r_[256, rng.integers(0, 256, n)].astype(np.int32) for n in (9, 4, 12)]
    transcoder = MatryoshkaTranscoder(TranscoderShape(model.d_model, model.d_model, (4,), 1, "rms"))
    transcoder.threshold.fill_(1.0)
    (sums,) = loss_sums(model, [transcoder], pack_windows(rows, [256]), [torch.zeros(model.d_model)])
    hf = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()
    seen = []
    hf.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            hf(torch.from_numpy(row.astype(np.int64))[None])
    expected = sum((1 / h[:-1].square().mean(1).sqrt()).sum().item() for h in seen)
    assert sums.norm_scale.sum() == pytest.approx(expected, rel=1e-4)
    assert sums.tokens.sum() == 25
    with pytest.raises(ValueError, match="full=True"):
        LanguageModel(config).direct_effect(torch.zeros(1, model.d_model))
