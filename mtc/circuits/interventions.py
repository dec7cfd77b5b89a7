"""Steering: features are set, scaled or added to in the real model, and it goes on with a prompt.

Both models, with the interventions and without, run side by side on both continuations, each with keys and values in
a cache: every token has its probability under both. With frozen attention, the changed model looks, token by token,
where the unchanged one looks on the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mtc.circuits.replacement import CircuitError, Prompt, ReplacementModel
from mtc.language_model.mlps import Sources, Visit
from mtc.results import Continuation, Intervention, NextToken, Steered
from mtc.storage import RunDirectory

MOST_INTERVENTIONS = 64
MOST_ROWS = 16
"""Most continuations that are drawn at once."""
SHOWN_NEXT = 10


class Step(NamedTuple):
    """The next token of each continuation."""

    plain: tuple[Drawn, ...]
    """Of those without interventions; None for one that has ended."""
    steered: tuple[Drawn, ...]
    """Of those with them."""


class _Token(NamedTuple):
    token_id: int
    plain: float
    """Natural logarithm of its probability without the interventions."""
    steered: float
    """The same with them."""


Drawn = _Token | None


class Steering:
    """One prompt that is gone on with; `next` is known at once, tokens come one by one from `steps`."""

    def __init__(
        self,
        model: ReplacementModel,
        prompt: Prompt,
        interventions: Sequence[Intervention],
        *,
        max_tokens: int = 20,
        n: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        attention: Literal["free", "frozen"] = "free",
        special: bool = False,
    ):
        """As `steer`."""
        window = model.window(prompt)
        _check(model, interventions, max_tokens, n, temperature)
        prompt_tokens = len(window.input_ids)
        most = model.model.max_tokens
        if most is not None and prompt_tokens + max_tokens > most:
            raise CircuitError(
                f"max_tokens={max_tokens} behind a prompt of {prompt_tokens} tokens: the model has {most} positions"
            )
        for number, each in enumerate(interventions):
            if each.positions is not None and max(each.positions) >= prompt_tokens + max_tokens:
                raise CircuitError(
                    f"interventions[{number}].positions has {max(each.positions)}: a prompt of {prompt_tokens} tokens "
                    f"and max_tokens={max_tokens} have 0 to {prompt_tokens + max_tokens - 1}"
                )
        self.model, self.interventions, self.attention = model, tuple(interventions), attention
        self.token_ids = tuple(window.input_ids.tolist())
        self._max_tokens, self._temperature, self._n = max_tokens, temperature, n
        self._generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(n)]
        self._changes = _Changes(model, self.interventions, 2 * n, special)
        leading = 2 * n if attention == "frozen" else None
        self._run = model.model.continuing(self._changes.visits(), leading)
        ids = window.input_ids.to(model.model.device).expand(4 * n, -1)
        self._logprobs = self._after(ids)
        """[4 n, vocabulary]: of the unchanged model behind the n plain continuations, behind the n steered ones, then
        of the changed model behind the same."""
        self.next = self._next()

    def steps(self) -> Iterator[Step]:
        """Draw the next token of each continuation, until all have ended or have `max_tokens`."""
        n, device, alive = self._n, self.model.model.device, [True] * (2 * self._n)
        for number in range(self._max_tokens):
            # Both of a pair are drawn with the same random number.
            chance = [float(torch.rand((), generator=g, dtype=torch.float64)) for g in self._generators] * 2
            own = torch.cat([self._logprobs[:n], self._logprobs[3 * n :]])
            ids = [self._draw(row, c) for row, c in zip(own, chance, strict=True)]
            ended = [i in self.model.ends for i in ids]
            drawn: list[Drawn] = [
                _Token(i, float(self._logprobs[row, i]), float(self._logprobs[2 * n + row, i]))
                if live and not end
                else None
                for row, (i, live, end) in enumerate(zip(ids, alive, ended, strict=True))
            ]
            alive = [token is not None for token in drawn]
            yield Step(tuple(drawn[:n]), tuple(drawn[n:]))
            if not any(alive) or number + 1 == self._max_tokens:
                return
            self._logprobs = self._after(torch.tensor(ids * 2, device=device)[:, None])

    def _after(self, ids: Tensor) -> Tensor:
        self._changes.begin(self._run.tokens, ids)
        return self._run.step(ids).double().log_softmax(1)

    def _draw(self, logprobs: Tensor, chance: float) -> int:
        if self._temperature == 0:
            return int(logprobs.argmax())
        cumulated = (logprobs / self._temperature).softmax(0).cumsum(0)
        return min(int(torch.searchsorted(cumulated, chance * cumulated[-1], right=True)), len(cumulated) - 1)

    def _next(self) -> tuple[NextToken, ...]:
        plain, steered = self._logprobs[0], self._logprobs[2 * self._n]
        most = min(SHOWN_NEXT, len(plain))
        ids = sorted({*plain.topk(most).indices.tolist(), *steered.topk(most).indices.tolist()})
        found = [
            NextToken(token_id=i, text=self.model.texts.token(i), plain=float(plain[i]), steered=float(steered[i]))
            for i in ids
        ]
        return tuple(sorted(found, key=lambda each: (-abs(each.steered - each.plain), each.token_id)))


def steer(
    run: str | RunDirectory | ReplacementModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    max_tokens: int = 20,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    attention: Literal["free", "frozen"] = "free",
    special: bool = False,
) -> Steered:
    """What the model goes on with, with the interventions and without, `n` times of up to `max_tokens` tokens.

    `run` and `prompt` are as for `attribute`; a prompt may also be chat messages, of a model that has a chat template.
    A `temperature` of 0 takes the most probable token; continuation i of `n` is drawn with `seed` + i. With `attention`
    "frozen", it looks where it looks without the interventions. Special tokens, which no transcoder is trained on, are
    left alone unless `special`.

    Raises CircuitError that names the argument, the limit and the value, and what `ReplacementModel.load` raises.
    """
    model = run if isinstance(run, ReplacementModel) else ReplacementModel.load(run)
    steering = Steering(
        model, prompt, interventions, max_tokens=max_tokens, n=n, temperature=temperature, seed=seed,
        attention=attention, special=special,
    )  # fmt: skip
    return collect(steering, list(steering.steps()))


def collect(steering: Steering, steps: Sequence[Step]) -> Steered:
    """All of a steering's steps as one record."""
    model = steering.model
    return Steered(
        run_id=model.run.run_id if model.run else None,
        base_model=model.model.config.name,
        token_ids=steering.token_ids,
        tokens=tuple(model.strings(steering.token_ids)),
        interventions=steering.interventions,
        attention=steering.attention,
        next=steering.next,
        plain=_continuations(model, [step.plain for step in steps]),
        steered=_continuations(model, [step.steered for step in steps]),
    )


def _continuations(model: ReplacementModel, steps: Sequence[Sequence[Drawn]]) -> tuple[Continuation, ...]:
    found = []
    for drawn in zip(*steps, strict=True):
        tokens = [token for token in drawn if token is not None]
        ids = tuple(token.token_id for token in tokens)
        found.append(
            Continuation(
                token_ids=ids,
                tokens=tuple(model.texts.sequence(ids)),
                plain=tuple(token.plain for token in tokens),
                steered=tuple(token.steered for token in tokens),
                ended=len(tokens) < len(drawn),
            )
        )
    return tuple(found)


class _Changes:
    """What the interventions do to the rows from `first` on."""

    def __init__(self, model: ReplacementModel, interventions: Sequence[Intervention], first: int, special: bool):
        self._model, self._first = model, first
        self._by_layer: dict[int, list[Intervention]] = {}
        for each in interventions:
            self._by_layer.setdefault(each.layer, []).append(each)
        self._left = torch.tensor([] if special else model.special, dtype=torch.int64, device=model.model.device)
        self._positions = self._ids = torch.empty(0)

    def begin(self, tokens: int, ids: Tensor) -> None:
        """A pass over these tokens [rows, new] comes, behind that many."""
        self._positions = torch.arange(tokens, tokens + ids.shape[1], device=ids.device)
        self._ids = ids[self._first :]

    def visits(self) -> dict[int, Visit]:
        return {layer: self._visit(layer, own) for layer, own in self._by_layer.items()}

    def _visit(self, layer: int, own: Sequence[Intervention]) -> Visit:
        transcoder = self._model.transcoders[layer]

        def visit(sources: Sources, mlp_out: Tensor) -> Tensor:
            source = self._model.source(layer, sources)[self._first :]
            before = transcoder.encode(source.flatten(0, 1)).unflatten(0, source.shape[:2])
            after = before.clone()
            touched = ~torch.isin(self._ids, self._left)
            for each in own:
                where = touched
                if each.positions is not None:
                    where = where & torch.isin(self._positions, torch.tensor(each.positions).to(where.device))
                value = after[..., each.feature]
                wanted = {"set": torch.full_like(value, each.value), "scale": value * each.value}
                after[..., each.feature] = torch.where(where, wanted.get(each.mode, value + each.value), value)
            features = sorted({each.feature for each in own})
            rows = transcoder.W_dec[features] / transcoder.target_scale
            changed = mlp_out.clone()
            changed[self._first :] += ((after - before)[..., features] @ rows).to(changed.dtype)
            return changed

        return visit


def _check(
    model: ReplacementModel, interventions: Sequence[Intervention], max_tokens: int, n: int, temperature: float
) -> None:
    if not 0 < len(interventions) <= MOST_INTERVENTIONS:
        raise CircuitError(f"interventions are {len(interventions)}: 1 to {MOST_INTERVENTIONS} are wanted")
    for number, each in enumerate(interventions):
        if each.layer not in model.transcoders:
            known = sorted(model.transcoders)
            raise CircuitError(f"interventions[{number}].layer={each.layer} has no transcoder; known: {known}")
        if each.feature >= (total := model.transcoders[each.layer].num_features):
            raise CircuitError(f"interventions[{number}].feature={each.feature}: 0 to {total - 1} are wanted")
    if max_tokens < 1:
        raise CircuitError(f"max_tokens={max_tokens}: at least 1 is wanted")
    if not 0 < n <= MOST_ROWS:
        raise CircuitError(f"n={n}: 1 to {MOST_ROWS} are wanted")
    if not 0 <= temperature <= 100:
        raise CircuitError(f"temperature={temperature}: 0 to 100 is wanted")
    if n > 1 and temperature == 0:
        raise CircuitError(f"n={n} with temperature=0, which gives the same every time: raise the temperature")
