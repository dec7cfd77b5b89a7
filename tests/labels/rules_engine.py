"""Stands in for vLLM on a cluster: answers by the rules of `tests.labels.rules_endpoint`, in an actor."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.label_engine import Answerer
from mtc.labels.endpoint import Answer
from mtc.labels.prompts import Question
from tests.labels.rules_endpoint import data_of, judged, kind_of, label_of


def by_rules(model: str, gpus: int, thinking_tokens: int, settings: Mapping[str, Any]) -> Answerer:
    """What answers; the name of the model says what goes wrong."""
    if model == "unknown":
        raise OSError(f"no model {model}")

    def answer(questions: Sequence[Question]) -> list[Answer]:
        if model == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if model == "breaks":
            raise RuntimeError("CUDA error")
        if model == "refuses":
            return [Answer("", "refused by the engine", 0, 0) for _ in questions]
        return [said(question) for question in questions]

    def said(question: Question) -> Answer:
        rows, kind = data_of(question.text), kind_of(question.text)
        text = f'{{"label": "{label_of(rows)}"}}' if kind == "explain" else str(judged(kind, rows))
        return Answer(text, None, 10, 5, None, f"by process {os.getpid()}")

    return answer
