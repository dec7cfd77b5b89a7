"""Ablation against transformers itself, with a hook written by hand and weights read from the saved file."""

from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtc.circuits import CircuitError, Intervention, ReplacementModel, ablate, steer
from mtc.language_model import MODULES, prepare_model
from tests.circuits.models import PROMPT, make_model

LAYER = 2


@pytest.fixture(params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest) -> ReplacementModel:
    return make_model(request.param)


class Hooked:
    """transformers' model of float64 and the transcoder's file; the formulas are written out."""

    def __init__(self, model: ReplacementModel, layer: int = LAYER):
        name = prepare_model(model.model.config)
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()
        modules = MODULES[self.model.config.model_type]
        own = self.model.base_model.get_submodule(modules.layers)[layer]
        self.norm, self.mlp_out = own.get_submodule(modules.norm), own.get_submodule(modules.mlp_out)
        self.weights = {k: v.double() for k, v in load(model.transcoders[layer].to_bytes()).items()}

    def activations(self, x: Tensor, feature: int) -> Tensor:
        w = self.weights
        x = x / x.pow(2).mean(1, keepdim=True).sqrt()
        z = x @ w["W_enc"][feature] + w["b_enc"][feature]
        return torch.where(z > w["threshold"], z, 0.0)

    @torch.no_grad()
    def logits(self, ids: list[int], features: list[int]) -> tuple[Tensor, Tensor]:
        """Logits behind every token without these features, and their activations [features, tokens]."""
        seen: dict[str, Any] = {"activations": []}

        def subtract(module: Any, arguments: Any, output: Tensor) -> Tensor:
            for feature in features:
                a = self.activations(seen["mid"], feature)
                a[0] = 0  # BOS, on which no transcoder is trained
                seen["activations"].append(a)
                output = output - a[:, None] * self.weights["W_dec"][feature] / self.weights["target_scale"]
            return output

        hooks = [
            self.norm.register_forward_hook(lambda m, a, o: seen.update(mid=a[0][0])),
            self.mlp_out.register_forward_hook(subtract),
        ]
        logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        for hook in hooks:
            hook.remove()
        return logits, torch.stack(seen["activations"]) if features else torch.zeros(0)


def firing(model: ReplacementModel, ids: list[int]) -> list[int]:
    """Features that fire, the strongest first."""
    _, found = Hooked(model).logits(ids, list(range(model.transcoders[LAYER].num_features)))
    order = found.max(1).values.argsort(descending=True).tolist()
    return [feature for feature in order if found[feature].any()]


def test_what_is_lost_is_what_a_hook_by_hand_takes(model: ReplacementModel) -> None:
    ids = model.window(PROMPT).input_ids.tolist()
    order = firing(model, ids)
    hooked = Hooked(model)
    plain, _ = hooked.logits(ids, [])
    for features in (order[:1], order[-1:], sorted(order[3:9])):
        found = ablate(model, PROMPT, LAYER, features)
        changed, activations = hooked.logits(ids, features)
        assert (found.features, found.layer, list(found.token_ids)) == (tuple(features), LAYER, ids)
        torch.testing.assert_close(torch.tensor(found.activations).double(), activations, rtol=1e-5, atol=1e-6)
        first = int(activations.any(0).nonzero()[0])
        p, q = plain.log_softmax(1), changed.log_softmax(1)
        kl = [float(sum(pi.exp() * (pi - qi) for pi, qi in zip(a, b, strict=True))) for a, b in zip(p, q, strict=True)]
        assert found.first == first and found.kl[:first] == (0.0,) * first
        assert max(kl) > 1e-7 and found.position == kl.index(max(kl))
        assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-9)
        assert found.loss_before == pytest.approx([-float(p[t, ids[t + 1]]) for t in range(len(ids) - 1)], rel=1e-5)
        assert found.loss_after == pytest.approx([-float(q[t, ids[t + 1]]) for t in range(len(ids) - 1)], rel=1e-5)
        change = q[found.position].exp() - p[found.position].exp()
        for shown, sign in ((found.up, 1), (found.down, -1)):
            wanted = (sign * change).argsort(descending=True)[: len(shown)].tolist()
            assert [each.token_id for each in shown] == wanted and len(shown) == 8
            for each in shown:
                wanted_logs = (float(p[found.position, each.token_id]), float(q[found.position, each.token_id]))
                assert (each.plain, each.steered) == pytest.approx(wanted_logs, abs=1e-5)


def test_a_silent_feature_changes_nothing_at_all(model: ReplacementModel) -> None:
    ids = model.window(PROMPT).input_ids.tolist()
    with torch.no_grad():
        model.transcoders[LAYER].b_enc[11] = -100
    found = ablate(model, ids, LAYER, [11])
    assert (found.first, found.position, found.up, found.down) == (None, None, (), ())
    assert set(found.kl) == {0.0} and found.loss_after == found.loss_before
    assert found.activations == ((0.0,) * len(ids),)


def test_it_is_steering_by_a_factor_of_0(model: ReplacementModel) -> None:
    ids = model.window(PROMPT).input_ids.tolist()
    feature = firing(model, ids)[0]
    steered = steer(model, ids, [Intervention(layer=LAYER, feature=feature, mode="scale", value=0.0)], max_tokens=1)
    # Of the last token but one, steering says how the last one's probability changes.
    found = ablate(model, [*ids, steered.plain[0].token_ids[0]], LAYER, [feature])
    assert -found.loss_before[-1] == pytest.approx(steered.plain[0].plain[0], abs=1e-6)
    assert -found.loss_after[-1] == pytest.approx(steered.plain[0].steered[0], abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "features", "told"),
    [
        (1, [0], r"layer=1 has no transcoder; known: \[0, 2\]"),
        (2, [], "features are 0: 1 to 64 are wanted"),
        (2, [99, 1], "features has 99: 0 to 47 are wanted"),
        (2, [-1], "features has -1: 0 to 47 are wanted"),
    ],
)
def test_what_cannot_be_taken_out_is_named(layer: int, features: list[int], told: str) -> None:
    with pytest.raises(CircuitError, match=told):
        ablate(make_model("llama"), PROMPT, layer, features)
