"""Detection, fuzzing and simulation: which contexts a judge is asked about, and what its answers are worth.

Detection and fuzzing are those of delphi (Paulo et al. 2024, arXiv:2410.13928), here with a judge that sees half active
and half silent contexts, near misses among them; simulation is that of Bills et al. 2023, with all tokens of a context
in one answer. Half of what fuzzing shows is marked wrongly: contexts in which the feature is active, with the marks on
as many tokens on which it is not, and silent ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.analysis import share
from mtc.labels.answers import UnusableAnswer, read_numbers
from mtc.labels.endpoint import Answer
from mtc.labels.evidence import Context, Evidence
from mtc.labels.prompts import Marked, Question, active_tokens, detect, fuzz, simulate
from mtc.results import Interval, LabelKind, LabelScore, LabelTest

PER_QUESTION = 10
"""Contexts of one question."""
SIMULATED = 4
"""Contexts that are simulated."""
STRONGEST = 10
"""Largest number of a simulation."""
LEVEL = 1.959963984540054
"""Standard deviations of a normal distribution within which 95 % lie, on both sides."""


class Item(NamedTuple):
    """A context that a judge is asked about, and what is right."""

    shown: Marked
    """The context with the marks that the judge sees; none in detection."""
    right: bool
    """Whether yes is the right answer."""


class Sheet(NamedTuple):
    """One question to the judge, and what is right."""

    test: LabelTest
    """What is asked."""
    question: Question
    """The question."""
    items: tuple[Item, ...]
    """What it is asked about, in the question's order; of simulation the one context."""


class Marks(NamedTuple):
    """What came of one sheet."""

    test: LabelTest
    """What was asked."""
    items: tuple[Item, ...]
    """What it was asked about."""
    said: tuple[float, ...]
    """The judge's answers, in the order of the items; of simulation a number for each token."""


def sheets(evidence: Evidence, label: str, seed: int, with_simulation: bool = False) -> list[Sheet]:
    """All questions about one label. Which contexts are asked about, and in which order, depends on the feature and the
    seed alone, so that labels of every origin are judged on the same."""
    random = np.random.default_rng([seed, evidence.feature, 1])
    found = [
        Sheet("detection", detect(evidence.feature, label, [i.shown.context for i in items]), items)
        for items in _parts(_detection(evidence), random)
    ]
    found += [
        Sheet("fuzzing", fuzz(evidence.feature, label, [i.shown for i in items]), items)
        for part in _fuzzing(evidence, random)
        for items in _parts(part, random)
    ]
    if with_simulation:
        contexts = evidence.kept[: SIMULATED - 1] + evidence.silent[:1]
        found += [
            Sheet("simulation", simulate(evidence.feature, label, c), (Item(Marked(c, frozenset()), c.peak > 0),))
            for c in contexts
        ]
    return found


def mark(sheet: Sheet, answer: Answer) -> Marks:
    """Read the answer to a sheet. Raises UnusableAnswer for one that can't be used."""
    if sheet.test != "simulation":
        return Marks(sheet.test, sheet.items, tuple(read_numbers(answer.text, len(sheet.items), 1)))
    count = len(sheet.items[0].shown.context.tokens)
    said: Sequence[float] = read_numbers(answer.text, count, STRONGEST)
    expected = _expected(answer.logprobs, count)
    return Marks(sheet.test, sheet.items, tuple(said if expected is None else expected))


def scores(labels: LabelKind, marks: Sequence[Marks]) -> list[LabelScore]:
    """The scores of one label, of those tests in which right and wrong contexts were answered."""
    found = []
    tests: tuple[LabelTest, ...] = ("detection", "fuzzing")
    for test in tests:
        pairs = [(i.right, s > 0.5) for m in marks if m.test == test for i, s in zip(m.items, m.said, strict=True)]
        right, wrong = [yes for is_right, yes in pairs if is_right], [yes for is_right, yes in pairs if not is_right]
        if right and wrong:
            said_yes = sum(yes for _, yes in pairs) / len(pairs)
            found.append(
                LabelScore(
                    labels=labels, test=test, score=balanced(right, [not yes for yes in wrong]), said_yes=said_yes,
                    contexts=len(pairs),
                )
            )  # fmt: skip
    simulated = [m for m in marks if m.test == "simulation"]
    truth = np.concatenate([np.empty(0), *(m.items[0].shown.context.activations for m in simulated)])
    if (score := correlation(truth, np.concatenate([np.empty(0), *(m.said for m in simulated)]))) is not None:
        found.append(LabelScore(labels=labels, test="simulation", score=score, said_yes=None, contexts=len(truth)))
    return found


def balanced(active: Sequence[bool], silent: Sequence[bool]) -> Interval:
    """Balanced accuracy from whether each answer about active, and about silent contexts, was right.

    Its interval puts Wilson's of the two shares together: MOVER (Zou and Donner 2008) for half their sum.
    """
    a, b = share(sum(active), len(active)), share(sum(silent), len(silent))
    value = (a.value + b.value) / 2
    return Interval(
        value=value,
        low=value - math.hypot(a.value - a.low, b.value - b.low) / 2,
        high=value + math.hypot(a.high - a.value, b.high - b.value) / 2,
    )


def correlation(truth: NDArray[Any], said: NDArray[Any]) -> Interval | None:
    """Pearson's correlation with the interval of Fisher's transformation; None of fewer than four tokens, or if either
    side is constant."""
    if len(truth) < 4 or not truth.std() or not said.std():
        return None
    value = float(np.clip(np.corrcoef(truth, said)[0, 1], -1, 1))
    if abs(value) == 1:
        return Interval(value=value, low=value, high=value)
    width = LEVEL / math.sqrt(len(truth) - 3)
    return Interval(value=value, low=math.tanh(math.atanh(value) - width), high=math.tanh(math.atanh(value) + width))


def _detection(evidence: Evidence) -> list[Item]:
    plain = [Marked(context, frozenset()) for context in (*evidence.kept, *evidence.silent)]
    return [Item(shown, shown.context.peak > 0) for shown in plain]


def _fuzzing(evidence: Evidence, random: np.random.Generator) -> list[list[Item]]:
    """Two parts, so that no question shows a context with its right marks and with wrong ones."""
    kept = [evidence.kept[i] for i in random.permutation(len(evidence.kept))]
    halves = kept[::2], kept[1::2]
    count = max(1, round(float(np.mean([len(active_tokens(c)) for c in kept]))))
    parts = []
    for right, wrong, silent in zip(halves, halves[::-1], (evidence.silent[::2], evidence.silent[1::2]), strict=True):
        items = [Item(Marked(context, active_tokens(context)), True) for context in right]
        moved = [Marked(context, _moved(context, random)) for context in wrong]
        others = [Marked(context, _some(len(context.tokens), count, random)) for context in silent]
        enough = [m for m in moved if m.marks][: -(-len(items) // 2)]
        items += [Item(shown, False) for shown in (*enough, *others[: len(items) - len(enough)])]
        parts.append(items)
    return parts


def _moved(context: Context, random: np.random.Generator) -> frozenset[int]:
    """As many tokens as are active, of those on which the feature is not; none where there are no such."""
    silent = [i for i, value in enumerate(context.activations) if value == 0]
    chosen = random.permutation(len(silent))[: len(active_tokens(context))]
    return frozenset(silent[i] for i in chosen)


def _some(tokens: int, count: int, random: np.random.Generator) -> frozenset[int]:
    return frozenset(random.permutation(tokens)[:count].tolist())


def _parts(items: list[Item], random: np.random.Generator) -> list[tuple[Item, ...]]:
    """The items in random order, in parts of at most PER_QUESTION and about the same size."""
    mixed = [items[i] for i in random.permutation(len(items))]
    count = -(-len(mixed) // PER_QUESTION)
    return [tuple(mixed[i::count]) for i in range(count)]


def _expected(logprobs: list[dict[str, Any]] | None, count: int) -> list[float] | None:
    """The mean of each number over what might have stood in its place (Bills et al. 2023); None if the endpoint gave no
    log-probabilities, or if the numbers are not one token each."""
    found = []
    for token in logprobs or ():
        if not _whole(token):
            continue
        options = [(int(o["token"]), math.exp(o["logprob"])) for o in token.get("top_logprobs") or () if _whole(o)]
        total = sum(weight for _, weight in options)
        if total:
            found.append(sum(number * weight for number, weight in options) / total)
    return found if len(found) == count else None


def _whole(token: Any) -> bool:
    """Whether a token of the answer is a number of a simulation."""
    text = str(token.get("token", "")).strip() if isinstance(token, dict) else ""
    return text.isascii() and text.isdigit() and int(text) <= STRONGEST


__all__ = ["Item", "Marks", "Sheet", "UnusableAnswer", "balanced", "correlation", "mark", "scores", "sheets"]
