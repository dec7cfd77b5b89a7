"""What explainer and judge are asked: templates of mtc/labels/templates, filled with data that can't leave its place.

Contexts and labels come from other people's documents and from models. They stand in a prompt as JSON, one object a
line: nothing in them can end the data, look like a mark, or be longer than it may.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any, NamedTuple

from mtc.labels.evidence import Context, Evidence

PROMPTS = ("explain", "detect", "fuzz", "simulate")
LABEL_CHARACTERS = 200
"""Longest label, of whoever it is."""
MOST_RELATIVES = 20
"""Labels of children that are shown with their parent."""
TOKEN_CHARACTERS = 60
"""Longest text of a token in a prompt."""
MARKED = 0.3
"""Share of a context's strongest activation from which on a token is marked."""
EXPLAIN_ANSWER, PER_CONTEXT_ANSWER = 120, 8
"""Tokens that an answer may take: a label; a number with what stands around it."""
LINE_BREAKS: dict[str, str | int | None] = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Characters that JSON leaves as they are and that may be read as the end of a line."""


class Question(NamedTuple):
    """What a language model is asked, and how long its answer may be."""

    kind: str
    """Name of the prompt."""
    feature: int
    """Index of the feature that it is about."""
    text: str
    """The whole prompt."""
    answer_tokens: int
    """Most tokens of the answer."""
    key: str
    """What makes it another question than others: the prompt, but for what was said of the feature's relatives. A label
    that was given stays, whatever becomes of theirs."""
    logprobs: bool = False
    """Whether log-probabilities of the answer's tokens are asked for."""


class Marked(NamedTuple):
    """A context with marks on some of its tokens."""

    context: Context
    """The context."""
    marks: frozenset[int]
    """Indices of the marked tokens."""


@cache
def template(name: str) -> Template:
    """One of PROMPTS."""
    return Template((resources.files("mtc.labels") / "templates" / f"{name}.txt").read_text(encoding="utf-8"))


@cache
def prompts_version() -> str:
    """12 hex digits that change whenever a prompt does, or how contexts are shown in it."""
    shown = json.dumps([MARKED, TOKEN_CHARACTERS, LABEL_CHARACTERS])
    text = "\0".join([shown, *(template(name).template for name in PROMPTS)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def explain(
    evidence: Evidence, broader: str | None = None, narrower: Sequence[str] = (), earlier: str | None = None
) -> Question:
    """What a feature responds to; `broader` is its parent's label, `narrower` are its children's, and `earlier` what
    was said of it without those."""
    rows: list[Mapping[str, Any]] = [
        {"active": marked(Marked(context, active_tokens(context))), "strength": _strength(context, evidence)}
        for context in evidence.shown
    ]
    rows += [{"silent": marked(Marked(context, frozenset()))} for context in evidence.shown_near]
    if evidence.raises:
        rows.append({"raises": [token[:TOKEN_CHARACTERS] for token in evidence.raises]})
    key = f"{'again' if narrower else 'first'} {template('explain').template} {_lines(rows)}"
    if broader is not None:
        rows.append({"broader": cut(broader)})
    if narrower:
        rows.append({"narrower": [cut(label) for label in narrower[:MOST_RELATIVES]]})
    if earlier is not None:
        rows.append({"earlier": cut(earlier)})
    text = template("explain").substitute(data=_lines(rows))
    return Question("explain", evidence.feature, text, EXPLAIN_ANSWER, key)


def detect(feature: int, label: str, contexts: Sequence[Context]) -> Question:
    """In which contexts the feature is active."""
    return _judge("detect", feature, label, [Marked(context, frozenset()) for context in contexts])


def fuzz(feature: int, label: str, contexts: Sequence[Marked]) -> Question:
    """In which contexts the marks are on the tokens on which the feature is active."""
    return _judge("fuzz", feature, label, contexts)


def simulate(feature: int, label: str, context: Context) -> Question:
    """How active the feature is on each token of a context."""
    rows = [{"label": cut(label)}, *({"token": token[:TOKEN_CHARACTERS]} for token in context.tokens)]
    text = template("simulate").substitute(data=_lines(rows), count=len(context.tokens))
    return Question("simulate", feature, text, PER_CONTEXT_ANSWER * len(context.tokens), text, logprobs=True)


def active_tokens(context: Context) -> frozenset[int]:
    """Indices of the tokens that are marked as active."""
    least = MARKED * context.peak
    return frozenset(i for i, value in enumerate(context.activations) if value > 0 and value >= least)


def marked(context: Marked) -> str:
    """The context's text with its marks; what looks like one in the text itself is pulled apart."""
    parts: list[str] = []
    tokens, marks = context.context.tokens, context.marks
    for i, token in enumerate(tokens):
        begins, ends = i in marks and i - 1 not in marks, i in marks and i + 1 not in marks
        parts += ["\0" * begins, token[:TOKEN_CHARACTERS].replace("\0", "").replace("\1", ""), "\1" * ends]
    text = re.sub(r"([<>])(?=\1)", r"\1 ", "".join(parts))
    return text.replace("\0", "<<").replace("\1", ">>")


def cut(label: str) -> str:
    """A label on one line, of at most LABEL_CHARACTERS, without control and format characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + "…"


def _judge(name: str, feature: int, label: str, contexts: Sequence[Marked]) -> Question:
    rows = [{"label": cut(label)}, *({"context": marked(context)} for context in contexts)]
    text = template(name).substitute(data=_lines(rows), count=len(contexts))
    return Question(name, feature, text, PER_CONTEXT_ANSWER * len(contexts), text)


def _strength(context: Context, evidence: Evidence) -> int:
    return round(10 * context.peak / evidence.strongest) if evidence.strongest else 0


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [json.dumps(row, ensure_ascii=False).translate(str.maketrans(LINE_BREAKS)) for row in rows]
    return "\n".join(lines)
