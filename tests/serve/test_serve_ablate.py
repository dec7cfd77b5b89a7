"""Features taken out of texts, over HTTP and on a feature's page, against transformers with a hook written by hand."""

# ruff: noqa: F811  (`tab` is a fixture of test_serve_ui.py)

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from serve_local import LocalControl, make_analysed_run, make_service, served, serving, wait_for_interventions
from test_serve_ui import ENTER, complaints, faults, tab, texts  # noqa: F401  # tab is a fixture
from transformers import AutoModelForCausalLM

from mtc.client import AsyncClient, Client
from mtc.language_model import prepare_model
from mtc.results import Ablated
from mtc.storage import RunDirectory
from serve.contract import AblateRequest
from serve.service import Circuits
from tests import chromium

PROMPT = "Hello, you!"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_analysed_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def url(run: RunDirectory) -> Iterator[str]:
    with served(run, interventions=True, notes=True) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            wait_for_interventions(client)
        yield url


@torch.no_grad()
def by_hand(run: RunDirectory, ids: list[int], features: list[int]) -> tuple[list[float], list[float], list[float]]:
    """KL at each token and both losses, of the model in float64 and the run's weights file; Gemma 2's layer adds what
    the norm behind its MLP gives, and the transcoder reads what the norm before it reads."""
    weights = {name: value.double() for name, value in load_file(run.location("transcoder.safetensors")).items()}
    config = run.config()
    model: Any = AutoModelForCausalLM.from_pretrained(prepare_model(config.model), dtype=torch.float64).eval()
    layer, seen = model.model.layers[1], {}

    def subtract(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        x = seen["mid"] / seen["mid"].pow(2).mean(-1, keepdim=True).sqrt()
        for feature in features:
            z = x @ weights["W_enc"][feature] + weights["b_enc"][feature]
            a = torch.where(z > weights["threshold"], z, 0.0)
            a[:, 0] = 0  # BOS, on which no transcoder is trained
            output = output - a[..., None] * weights["W_dec"][feature] / weights["target_scale"]
        return output

    plain = model(torch.tensor([ids])).logits[0].log_softmax(1)
    layer.pre_feedforward_layernorm.register_forward_hook(lambda m, a, o: seen.update(mid=a[0]))
    layer.post_feedforward_layernorm.register_forward_hook(subtract)
    without = model(torch.tensor([ids])).logits[0].log_softmax(1)
    follows = torch.tensor(ids[1:])[:, None]
    losses = [(-each[:-1].gather(1, follows))[:, 0].tolist() for each in (plain, without)]
    return (plain.exp() * (plain - without)).sum(1).tolist(), *losses


def test_what_is_lost_is_what_a_hook_by_hand_takes(url: str, run: RunDirectory) -> None:
    with Client(url) as client:
        ids = client.tokenize(PROMPT).inputs[0].token_ids.tolist()
        active = {i for i, _ in client.encode(PROMPT).inputs[0].top(5, 64)}
        for features in ([min(active)], sorted(active)[:5]):
            found = client.ablate(PROMPT, layer=1, features=features)
            kl, before, after = by_hand(run, ids, features)
            assert max(kl) > 1e-5 and found.first is not None and found.position == kl.index(max(kl))
            assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
            assert found.loss_before == pytest.approx(before, rel=1e-4)
            assert found.loss_after == pytest.approx(after, rel=1e-4)
            assert found == client.ablate(input_ids=ids, layer=1, features=features, model="one")

    async def ask() -> Ablated:
        async with AsyncClient(url) as own:
            return await own.ablate(PROMPT, layer=1, features=features)

    assert asyncio.run(ask()) == found


def test_a_silent_feature_loses_nothing(url: str) -> None:
    with Client(url) as client:
        active = {i for t in range(12) for i, _ in client.encode(PROMPT).inputs[0].top(t, 64)}
        silent = next(i for i in range(64) if i not in active)
        found = client.ablate(PROMPT, layer=1, features=[silent])
    assert found.first is found.position is None and set(found.kl) == {0.0} and found.loss_before == found.loss_after


def test_only_where_interventions_are_on_and_within_their_limits(run: RunDirectory, url: str) -> None:
    body = {"prompt": PROMPT, "layer": 1, "features": [1]}
    with served(run) as plain, httpx.Client(base_url=plain, timeout=60) as client:
        answer = client.post("/ablate", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (409, "no_interventions")
        assert "to-ablate" not in client.get("/ui/feature/3").text
    with httpx.Client(base_url=url, timeout=60) as client:
        for asked, status, told in (
            ({"prompt": "x" * 200}, 413, "the text has 201 tokens, the limit is 128"),
            ({"prompt": "x" * 1200}, 413, "the text has 1201 tokens, the limit is 128"),  # nor has the model positions
            ({"layer": 0}, 422, "layer=0 has no transcoder"),
            ({"features": [64]}, 422, "features has 64: 0 to 9 are wanted"),
            ({"prompt": None}, 422, "give either `prompt` or `input_ids`"),
        ):
            answer = client.post("/ablate", json={k: v for k, v in (body | asked).items() if v is not None})
            assert answer.status_code == status and told in answer.json()["error"], answer.text


def test_who_comes_when_too_many_wait_is_told_so(run: RunDirectory) -> None:
    service = make_service(LocalControl(run), interventions=True, max_steerings=1)
    circuits: Circuits = service.interventions.circuits  # type: ignore[attr-defined]
    key, asked = LocalControl(run).keys[0], AblateRequest(prompt=PROMPT, layer=1, features=[1])
    circuits.open(key)
    done: list[Any] = []
    first = threading.Thread(target=lambda: done.append(circuits.ablations.ablate(key, asked)))
    with circuits.steerings._model.turns.turn():  # as a part of a graph has it
        first.start()
        while not circuits.ablations._inside:
            first.join(0.01)
        with serving(service) as url:
            body = asked.model_dump(exclude_none=True)
            answer = httpx.post(f"{url}/ablate", json=body, timeout=60)
            assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
            assert answer.headers["retry-after"] == "2" and answer.json()["detail"] == {"limit": 1, "value": 2}
            assert not done
    first.join(60)
    assert done[0].run_id == "one" and circuits.ablations._inside == 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_on_a_features_page(tab: chromium.Page, url: str, width: int, scheme: str) -> None:
    example = httpx.get(f"{url}/features/3/examples", params={"limit": 1}, timeout=60).json()["examples"][0]
    ids = [256, *example["token_ids"]]
    body = {"input_ids": ids, "layer": 1, "features": [3]}
    wanted = Ablated.model_validate(httpx.post(f"{url}/ablate", json=body, timeout=60).json())
    tab.open(f"{url}/ui/feature/3", width, 900, scheme)
    tab.wait("document.querySelector('.take-out')")
    contexts = tab.evaluate("document.querySelectorAll('.contexts:not(.near) > li').length")
    assert len(texts(tab, ".take-out")) == contexts > 1
    tab.evaluate("document.querySelector('.take-out').focus()")
    tab.press(*ENTER)
    tab.wait("!document.querySelector('.take-out').disabled && document.querySelector('.taken-out p').textContent")
    tab.wait("!document.querySelector('.taken-out p').textContent.includes('…')")
    told = texts(tab, ".taken-out p")[0]
    assert tab.evaluate("document.activeElement.className") == "take-out"
    if wanted.first is None:
        assert "does not fire" in told and texts(tab, ".taken-out table") == []
    else:
        assert f"{wanted.kl[wanted.position]:.4g}"[:5] in told  # type: ignore[index]
        assert len(texts(tab, ".tokens bdi > *")) == len(ids)
        shown = texts(tab, ".taken-out .effects tbody th")
        assert len(shown) == len(wanted.up) + len(wanted.down)
        tab.evaluate("document.querySelector('.taken-out details').open = true")
        assert len(texts(tab, ".taken-out details tbody tr")) == len(ids) - wanted.first
    assert f"{example['activation']:.4g}" in told
    assert faults(tab) == [] and complaints(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert json.loads(tab.evaluate("JSON.stringify([...document.querySelectorAll('main img')])")) == []
