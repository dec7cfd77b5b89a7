"""What a labelling will cost, before anything is asked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mtc.labels.evidence import RunEvidence
from mtc.labels.labelling import Settings, to_label, to_score
from mtc.labels.prompts import Question, explain
from mtc.labels.scores import sheets
from mtc.labels.transport import tokens_of

LOOKED_AT = 100
"""Features of each kind whose prompts are made; the others' are taken to be like theirs."""
A_LABEL = "words that say in about as many letters as labels have what a feature responds to"


class Cost(NamedTuple):
    """Questions and tokens, by estimate."""

    features: int
    """Features to label."""
    scored: int
    """Features to judge labels of."""
    questions: int
    """Questions about all of them."""
    prompt_tokens: int
    """Tokens of their prompts, at four characters a token."""
    most_answer_tokens: int
    """Tokens of their answers, if each takes all that it may."""


def estimate(evidence: RunEvidence, settings: Settings, thinking_tokens: int = 0) -> Cost:
    """The cost of asking everything anew; what was asked before costs nothing."""
    features, scored = to_label(evidence, settings), to_score(evidence, settings)
    parts = np.zeros(3)
    for wanted, judged in ((features, False), (scored, True)):
        some = np.random.default_rng(0).permutation(wanted)[:LOOKED_AT].tolist()
        for j in some:
            own = _judged(evidence, j, settings) if judged else _explained(evidence, j)
            answers = sum(question.answer_tokens + thinking_tokens for question in own)
            cost = np.array([len(own), sum(tokens_of(question.text) for question in own), answers])
            parts += cost * len(wanted) / len(some)
    return Cost(len(features), len(scored), *(round(float(part)) for part in parts))


def _explained(evidence: RunEvidence, feature: int) -> list[Question]:
    row, about = evidence.rows[feature], evidence.of(feature)
    found = [explain(about, None if row.parent is None else A_LABEL)]
    if any(evidence.rows[child].samples for child in row.children):
        found.append(explain(about, None, [A_LABEL] * len(row.children), A_LABEL))
    return found


def _judged(evidence: RunEvidence, feature: int, settings: Settings) -> list[Question]:
    about = evidence.of(feature)
    if about.too_little:
        return []
    labels = [A_LABEL, *([label] if (label := evidence.rows[feature].machine_label) else [])]
    return [sheet.question for label in labels for sheet in sheets(about, label, settings.seed, settings.simulation)]
