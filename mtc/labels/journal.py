"""Answers as they came, so that nothing is asked twice: `labelling/*.jsonl` in the run.

A question is known by a digest of its key, of the model and of how the answer was asked for: another prompt, other
examples or another model are other questions. On local disks a line is written as soon as its answer is there; on
object stores, where nothing is appended, the answers of a few seconds go into a part of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

from mtc.labels.answers import THOUGHT
from mtc.labels.endpoint import Answer
from mtc.labels.prompts import Question
from mtc.storage import RunDirectory, patiently, write_atomic

DIRECTORY = "labelling"
PART_SECONDS = 5.0
"""Seconds between parts on object stores."""
KEPT_CHARACTERS = 4000
"""Of an answer, the last ones: before them a model may have thought aloud."""


class Journal:
    """The answers of a run's labelling, old and new, while used as a context."""

    def __init__(self, run: RunDirectory, model: str):
        self.run, self.model = run, model
        self._known: dict[str, Answer] = {}
        self._lines: list[str] = []
        self._written = time.monotonic()
        self._local = "://" not in run.url or run.url.startswith("file://")
        self._place = posixpath.join(run.url, DIRECTORY)
        self._file: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for name in sorted(RunDirectory(self._place).names()):
            if name.endswith(".jsonl"):
                self._read(self.run.read(f"{DIRECTORY}/{name}"))
        if self._local:
            directory = self._place.removeprefix("file://")
            os.makedirs(directory, exist_ok=True)
            self._file = open(os.path.join(directory, f"{self._name()}.jsonl"), "a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: Question) -> Answer | None:
        """The answer that a question got; None if it was never asked, or without success."""
        return self._known.get(self._digest(question))

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer. Failures are not kept, nor is an empty answer, which a model gives that had too few tokens to
        think: what they are of is asked again."""
        if answer.failure or not answer.text.rpartition(THOUGHT)[2].strip():
            return
        digest = self._digest(question)
        with self._lock:
            if digest in self._known:
                return
            self._add(digest, question, answer)

    def _add(self, digest: str, question: Question, answer: Answer) -> None:
        answer = answer._replace(text=answer.text.rpartition(THOUGHT)[2][-KEPT_CHARACTERS:])
        self._known[digest] = answer
        about = {"question": digest, "kind": question.kind, "feature": question.feature, **answer._asdict()}
        del about["failure"]
        self._lines.append(json.dumps(about) + "\n")
        if self._local or time.monotonic() - self._written > PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        lines, self._lines, self._written = self._lines, [], time.monotonic()
        if not lines:
            return
        if self._file is not None:
            self._file.writelines(lines)
            self._file.flush()
        else:
            url = posixpath.join(self._place, f"{self._name()}.jsonl")
            patiently(lambda: write_atomic(url, "".join(lines).encode()))

    def _read(self, content: bytes) -> None:
        for line in content.split(b"\n"):
            try:
                about = json.loads(line)
            except ValueError:  # the last one of a job that was killed; its question is asked again
                continue
            self._known[about["question"]] = Answer(
                about["text"], None, about["prompt_tokens"], about["answer_tokens"], about["logprobs"], about["time"]
            )

    def _digest(self, question: Question) -> str:
        asked = [self.model, question.key, question.answer_tokens, question.logprobs]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @staticmethod
    def _name() -> str:
        return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
