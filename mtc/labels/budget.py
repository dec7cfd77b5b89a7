"""How many tokens a labelling may cost, and did."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from mtc.labels.transport import tokens_of

SURPLUS = 1.5
"""How much longer than estimated a prompt is taken to be while it is asked."""


class Costly(Hashable, Protocol):
    """A question."""

    @property
    def text(self) -> str:
        """All that is sent."""

    @property
    def answer_tokens(self) -> int:
        """Most tokens of the answer; 0 where there is none to pay for."""


class Paid(Protocol):
    """An answer."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the question."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer."""


class Budget:
    """Tokens of prompts and answers: a question is asked only if what it may cost at most still fits."""

    def __init__(self, most: int | None, thinking_tokens: int = 0):
        self.most, self.thinking_tokens = most, thinking_tokens
        self.spent = 0
        """Tokens of the questions that were answered now."""
        self.exhausted = False
        """Whether a question was left out because it did not fit."""
        self._reserved: dict[Costly, int] = {}

    def fits(self, question: Costly) -> bool:
        """Whether a question may be asked at all; once one may not, none is any more."""
        self.exhausted = self.exhausted or (self.most is not None and self.spent + self._cost(question) > self.most)
        return not self.exhausted

    def take(self, question: Costly) -> bool:
        """Whether a question may be asked now, or only when others are settled; its room is kept until `settle`."""
        cost = self._cost(question)
        if self.most is not None and self.spent + sum(self._reserved.values()) + cost > self.most:
            return False
        self._reserved[question] = cost
        return True

    def settle(self, question: Costly, answer: Paid) -> None:
        """Count what an answer cost; one that was known already costs nothing."""
        if self._reserved.pop(question, None) is not None:
            self.spent += answer.prompt_tokens + answer.answer_tokens

    def _cost(self, question: Costly) -> int:
        """The most that it may cost, if nothing goes wrong."""
        thinking = self.thinking_tokens if question.answer_tokens else 0
        return int(SURPLUS * tokens_of(question.text)) + question.answer_tokens + thinking
