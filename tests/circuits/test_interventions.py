"""Steering and faithfulness against transformers itself, with plain hooks and without a cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtc.circuits import CircuitError, FeatureTarget, Intervention, ReplacementModel, attribute, steer
from mtc.circuits.adjacency import keep_features
from mtc.circuits.attribution import attribute_whole
from mtc.circuits.faithfulness import compare, contributions, measure_faithfulness
from mtc.circuits.graph import to_graph
from mtc.circuits.interventions import Steering, collect
from mtc.language_model import MODULES, attention, prepare_model
from tests.circuits.models import ARCHITECTURES, PROMPT, make_model

Change = Callable[[Tensor, Tensor], Tensor]
"""From what an MLP reads and writes, [tokens, d_model], what it writes instead."""


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> ReplacementModel:
    return make_model(request.param)


class Plain:
    """transformers' model, one sequence at a time, whose MLPs are changed by hooks."""

    def __init__(self, model: ReplacementModel):
        name = prepare_model(model.model.config)
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()
        self.modules = MODULES[self.model.config.model_type]
        self.layers = self.model.base_model.get_submodule(self.modules.layers)
        self.parallel = getattr(self.model.config, "use_parallel_residual", False)

    @torch.no_grad()
    def logits(self, ids: list[int], changes: dict[int, Change]) -> Tensor:
        """[vocabulary] behind the last token."""
        hooks = []
        for layer, change in changes.items():
            seen: dict[str, Tensor] = {}
            module = self.layers[layer].get_submodule

            def after_mlp(m: Any, a: Any, o: Tensor, s: Any = seen, change: Change = change) -> Tensor:
                return change((s["mid"] + (s["attention"] if self.parallel else 0))[0], o[0])[None]

            hooks += [
                module(self.modules.attention).register_forward_hook(lambda m, a, o, s=seen: s.update(attention=o[0])),
                module(self.modules.norm).register_forward_hook(lambda m, a, o, s=seen: s.update(mid=a[0])),
                module(self.modules.mlp_out).register_forward_hook(after_mlp),
            ]
        logits: Tensor = self.model(torch.tensor([ids])).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return logits


def by_hand(model: ReplacementModel, interventions: list[Intervention], ids: list[int]) -> dict[int, Change]:
    """Changes that are written out: W_dec times how much the activation changes, at tokens that are not special."""
    changes = {}
    for layer in {each.layer for each in interventions}:
        transcoder = model.transcoders[layer]
        own = [each for each in interventions if each.layer == layer]

        def change(mid: Tensor, out: Tensor, transcoder: Any = transcoder, own: Any = own) -> Tensor:
            out = out.clone()
            for t in range(len(out)):
                z = transcoder.encode(mid[t : t + 1])[0]
                for each in own:
                    if ids[t] in model.special or (each.positions is not None and t not in each.positions):
                        continue
                    a = z[each.feature]
                    new = {"set": each.value, "scale": a * each.value, "add": a + each.value}[each.mode]
                    out[t] += (new - a) * transcoder.W_dec[each.feature] / transcoder.target_scale
            return out.detach()

        changes[layer] = change
    return changes


INTERVENTIONS = [
    Intervention(layer=0, feature=3, mode="set", value=30.0),
    Intervention(layer=2, feature=20, mode="add", value=-40.0),
    Intervention(layer=2, feature=7, mode="scale", value=25.0, positions=(2, 5, 13)),
]


def test_steered_continuations_are_those_of_plain_hooks(model: ReplacementModel) -> None:
    made = steer(model, PROMPT, INTERVENTIONS, max_tokens=6)
    plain, prompt = Plain(model), list(made.token_ids)
    assert made.steered[0].steered != pytest.approx(made.steered[0].plain, abs=0.01)
    for steered, found in ((False, made.plain[0]), (True, made.steered[0])):
        for n, token in enumerate(found.token_ids):
            ids = prompt + list(found.token_ids[:n])
            without = plain.logits(ids, {}).log_softmax(0)
            changed = plain.logits(ids, by_hand(model, INTERVENTIONS, ids)).log_softmax(0)
            assert token == int((changed if steered else without).argmax())
            assert found.plain[n] == pytest.approx(float(without[token]), abs=1e-4)
            assert found.steered[n] == pytest.approx(float(changed[token]), abs=1e-4)
    changed = plain.logits(prompt, by_hand(model, INTERVENTIONS, prompt)).log_softmax(0)
    without = plain.logits(prompt, {}).log_softmax(0)
    for each in made.next:
        assert each.plain == pytest.approx(float(without[each.token_id]), abs=1e-4)
        assert each.steered == pytest.approx(float(changed[each.token_id]), abs=1e-4)
    assert {int(without.argmax()), int(changed.argmax())} <= {each.token_id for each in made.next}
    gaps = [abs(each.steered - each.plain) for each in made.next]
    assert gaps == sorted(gaps, reverse=True)


def test_frozen_attention_looks_where_the_unchanged_model_looks(model: ReplacementModel) -> None:
    """Behind every token: a pass over the whole text whose patterns are kept from one without the changes."""
    made = steer(model, PROMPT, INTERVENTIONS, max_tokens=5, attention="frozen")
    free = steer(model, PROMPT, INTERVENTIONS, max_tokens=5)
    assert made.plain[0].token_ids == free.plain[0].token_ids
    assert made.plain[0].steered != pytest.approx(free.plain[0].steered, abs=1e-6)
    language_model = model.model
    for found in (made.plain[0], made.steered[0]):
        for n, token in enumerate(found.token_ids):
            ids = list(made.token_ids) + list(found.token_ids[:n])
            window = model.window(ids)
            own = {"windows": attention.Windows([len(ids)], patterns=attention.Patterns())}
            changes = by_hand(model, INTERVENTIONS, ids)
            visits = {
                layer: lambda sources, out, c=change: c(sources.resid_mid[0], out[0])[None]
                for layer, change in changes.items()
            }
            with torch.no_grad():
                language_model._run(language_model.model, window, **own)
                with language_model._mlps.visited(visits):
                    logits = language_model._run(language_model.model, window, **own).logits[0, -1]
            assert found.steered[n] == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-6)


def test_sampled_continuations_follow_their_seeds_and_temperature() -> None:
    model = make_model("llama")
    many = steer(model, PROMPT, INTERVENTIONS, max_tokens=4, n=5, temperature=1.5, seed=7)
    for i in (0, 4):
        alone = steer(model, PROMPT, INTERVENTIONS, max_tokens=4, temperature=1.5, seed=7 + i)
        for ours, theirs in ((many.plain[i], alone.plain[0]), (many.steered[i], alone.steered[0])):
            assert ours.token_ids == theirs.token_ids
            assert ours.plain == pytest.approx(theirs.plain) and ours.steered == pytest.approx(theirs.steered)
    assert len({each.token_ids for each in many.plain}) > 1
    cold = steer(model, PROMPT, INTERVENTIONS, max_tokens=4, temperature=1e-6)
    greedy = steer(model, PROMPT, INTERVENTIONS, max_tokens=4)
    assert cold.plain == greedy.plain and cold.steered == greedy.steered
    # Drawn from the distribution: frequencies of the first token against its probabilities.
    steering = Steering(model, PROMPT, INTERVENTIONS, n=1, temperature=1.0)
    chances = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = torch.tensor([steering._draw(steering._logprobs[0], float(c)) for c in chances])
    counted = torch.bincount(drawn, minlength=len(steering._logprobs[0])).double() / len(drawn)
    torch.testing.assert_close(counted, steering._logprobs[0].exp(), atol=1e-4, rtol=0)


def test_a_text_ends_where_the_model_ends_it() -> None:
    model = make_model("llama")
    going = steer(model, PROMPT, INTERVENTIONS, max_tokens=6)
    model.ends = frozenset({going.plain[0].token_ids[2]})
    ended = steer(model, PROMPT, INTERVENTIONS, max_tokens=6)
    assert ended.plain[0].ended and ended.plain[0].token_ids == going.plain[0].token_ids[:2]
    first = next((n for n, i in enumerate(going.steered[0].token_ids) if i in model.ends), 6)
    assert ended.steered[0].token_ids == going.steered[0].token_ids[:first]
    assert ended.steered[0].ended == (first < 6)


def test_steps_come_one_by_one_and_make_the_whole() -> None:
    model = make_model("gpt2")
    steering = Steering(model, PROMPT, INTERVENTIONS, max_tokens=3)
    assert steering.next
    steps = list(steering.steps())
    assert len(steps) == 3
    assert collect(steering, steps) == steer(model, PROMPT, INTERVENTIONS, max_tokens=3)


def test_special_tokens_are_left_alone_unless_asked() -> None:
    model = make_model("gemma3")
    only_bos = [Intervention(layer=0, feature=1, value=50.0, positions=(0,))]
    assert model.window(PROMPT).input_ids[0] in model.special
    left, asked = (steer(model, PROMPT, only_bos, max_tokens=1, special=special) for special in (False, True))
    assert all(each.plain == pytest.approx(each.steered, abs=1e-12) for each in left.next)
    assert max(abs(each.plain - each.steered) for each in asked.next) > 1e-3


BAD = [
    ({"interventions": []}, "interventions are 0: 1 to 64"),
    ({"interventions": [Intervention(layer=1, feature=0, value=1)]}, r"interventions\[0\].layer=1 .* known: \[0, 2\]"),
    ({"interventions": [Intervention(layer=2, feature=48, value=1)]}, r"interventions\[0\].feature=48: 0 to 47"),
    (
        {"interventions": [Intervention(layer=2, feature=1, value=1, positions=(3, 32))], "max_tokens": 20},
        r"interventions\[0\].positions has 32: a prompt of 12 tokens and max_tokens=20 have 0 to 31",
    ),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": 10**6}, "max_tokens=1000000 behind a prompt of 12 tokens"),
    ({"n": 17, "temperature": 1.0}, "n=17: 1 to 16"),
    ({"n": 2}, "n=2 with temperature=0"),
    ({"temperature": -1.0}, "temperature=-1"),
    ({"prompt": [{"role": "user", "content": "Hi"}]}, "no chat template"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_arguments_name_the_limit_and_the_value(settings: dict[str, Any], message: str) -> None:
    about: dict[str, Any] = {"prompt": PROMPT, "interventions": INTERVENTIONS} | settings
    with pytest.raises(CircuitError, match=message):
        steer(make_model("llama"), about.pop("prompt"), about.pop("interventions"), **about)


def test_chat_messages_become_the_templates_tokens_and_cannot_spell_special_ones() -> None:
    model = make_model("llama")
    bos = model.tokenizer.bos_token
    model.tokenizer.chat_template = (
        bos + "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
    )
    ids = model.window([{"role": "user", "content": "Hi"}]).input_ids.tolist()
    text = model.tokenizer.encode("[user]Hi\n[assistant]", add_special_tokens=False)
    assert ids == [model.tokenizer.bos_token_id, *text]
    with pytest.raises(CircuitError, match=r"prompt\[0\].content spells the special token"):
        model.window([{"role": "user", "content": f"Hi {bos}"}])
    with pytest.raises(CircuitError, match=r"prompt\[0\] is no message with a role and a content"):
        model.window([{"content": "Hi"}])
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CircuitError, match="roles must alternate"):
        model.window([{"role": "user", "content": "Hi"}])


def test_a_feature_is_taken_out_as_with_a_plain_hook(model: ReplacementModel) -> None:
    whole = attribute_whole(model, PROMPT)
    graph = to_graph(whole, 1, 1)
    found = measure_faithfulness(whole, graph, most=8)
    plain, ids = Plain(model), list(whole.token_ids)

    def target(changes: dict[int, Change]) -> float:
        logits = plain.logits(ids, changes)
        return float((logits[list(whole.targets)] - logits.mean()) @ whole.adjacency.weights)

    assert len(found.nodes) == 8
    for number, real in zip(found.nodes, found.real, strict=True):
        node = graph.nodes[number]
        assert node.layer is not None and node.activation is not None
        transcoder = model.transcoders[node.layer]
        row = (node.activation * transcoder.W_dec[node.feature] / transcoder.target_scale).detach()

        def less(mid: Tensor, out: Tensor, row: Tensor = row, token: int = node.token) -> Tensor:
            out = out.clone()
            out[token] -= row
            return out

        assert real == pytest.approx(target({node.layer: less}) - target({}), abs=1e-5)


def test_contributions_are_those_of_the_inverse_matrix() -> None:
    whole = attribute_whole(make_model("gemma2"), PROMPT)
    found = keep_features(whole.adjacency, whole.adjacency.feature < 16)
    n = found.num_features
    step = found.edges[:n, :n] / found.activation[:n]  # derivative of one pre-activation by another activation
    gains = found.weights @ found.edges[n:, :n] / found.activation
    total = gains @ torch.linalg.inv(torch.eye(n, dtype=torch.float64) - step)
    torch.testing.assert_close(contributions(found)[:n], total * found.activation)


def test_how_two_lists_of_changes_go_together() -> None:
    found = compare([1.0, 2.0, -3.0, 0.5], [10.0, 20.0, 1.0, 5.0], [4, 5, 6, 7])
    assert (found.spearman, found.same_sign) == (pytest.approx(1.0), 0.75)
    assert compare([1.0, 2.0], [1.0, 2.0], [0, 1]).spearman is None
    assert compare([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [0, 1, 2]).spearman is None
    assert compare([], [], []).same_sign is None
    model = make_model("llama")
    whole = attribute_whole(model, PROMPT, targets=[FeatureTarget(2, 5, 3)])
    with pytest.raises(CircuitError, match="targets are features"):
        measure_faithfulness(whole, to_graph(whole, 1, 1), most=8)


def test_threads_share_a_model() -> None:
    """Hooks are of a model: passes that run at once must not see each other's."""
    model = make_model("llama")
    graph, steered = attribute(model, PROMPT), steer(model, PROMPT, INTERVENTIONS, max_tokens=8)
    with ThreadPoolExecutor(6) as pool:
        graphs = [pool.submit(attribute, model, PROMPT) for _ in range(6)]
        texts = [pool.submit(steer, model, PROMPT, INTERVENTIONS, max_tokens=8) for _ in range(6)]
        assert all(each.result() == graph for each in graphs)
        assert all(each.result() == steered for each in texts)
