"""What language models answered, read with suspicion: a label, numbers, or a reason why it can't be used."""

from __future__ import annotations

import json
import re
from typing import Any

from mtc.errors import MtcError
from mtc.labels.prompts import cut

THOUGHT = "</think>"
"""What ends the thoughts of models that think before they answer."""
LONGEST = 20_000
"""Characters above which an answer is not looked at, without the thoughts before it."""
_REFUSAL = re.compile(
    r"\b(I('m| am) (sorry|unable|not able)|I (can ?not|can['’]t|won['’]t|will not)|as an AI)\b", re.IGNORECASE
)


class UnusableAnswer(MtcError):
    """An answer that says nothing of what was asked; the message is the reason in a word or two."""


def read_label(text: str) -> str:
    """The label in an explainer's answer, on one line and no longer than labels may be.

    Raises UnusableAnswer: `empty`, `too long`, `refused`, or `malformed`.
    """
    for found in _json(_checked(text), "{"):
        label = found.get("label") if isinstance(found, dict) else None
        if isinstance(label, str) and (label := cut(label)):
            if label == "...":  # of the prompt's own example
                break
            return label
    raise UnusableAnswer("refused" if _REFUSAL.search(text) else "malformed")


def read_numbers(text: str, count: int, most: int) -> list[int]:
    """The `count` whole numbers from 0 to `most` in a judge's answer. Raises UnusableAnswer as `read_label`."""
    for found in _json(_checked(text), "["):
        if isinstance(found, list) and len(found) == count and all(_is_number(each, most) for each in found):
            return [int(each) for each in found]
    raise UnusableAnswer("refused" if _REFUSAL.search(text) else "malformed")


def _checked(text: str) -> str:
    """The answer without what a model thought before it."""
    answer = text.rpartition(THOUGHT)[2].strip()
    if len(answer) > LONGEST:
        raise UnusableAnswer("too long")
    if not answer:
        raise UnusableAnswer("empty")
    return answer


def _json(text: str, opening: str) -> list[Any]:
    """The JSON values that begin with a bracket and stand somewhere in the text, the last first: what a model says
    before its answer is not it."""
    decoder, found, at = json.JSONDecoder(), [], text.find(opening)
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find(opening, end)
    return found[::-1]


def _is_number(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most and value == int(value)
