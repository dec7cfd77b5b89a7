"""Labels of a dictionary's features by a language model, and their scores, from a finished run's files.

Questions are asked in rounds, since the nested dictionary is what labels can build on: the features without a parent,
their children with the parent's label, and so on; then every parent once more with the labels of its children; then the
judge, on contexts that the explainer never saw. Each round's questions are asked many at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mtc.labels.answers import UnusableAnswer, read_label
from mtc.labels.budget import Budget
from mtc.labels.endpoint import Answer, Asking
from mtc.labels.evidence import RunEvidence
from mtc.labels.journal import Journal
from mtc.labels.prompts import Question, explain, prompts_version
from mtc.labels.scores import Marks, Sheet, mark, scores, sheets
from mtc.labels.transport import Known
from mtc.results import FeatureLabel, LabelKind, LabelScore

EXPLAIN, REVISE, JUDGE = "labelling", "labelling parents again", "judging"


class Asked(Protocol):
    """Something that answers questions: mtc.labels.endpoint.Endpoint, or an engine on a cluster."""

    model: str

    def answers(self, questions: Iterable[Asking]) -> Iterator[tuple[Question, Answer]]:
        """The answers as they come; questions are drawn as they are needed, and those that are known handed through."""


class Progress(NamedTuple):
    """How far a labelling is."""

    stage: str
    """What is asked about."""
    done: int
    """Questions of the stage that are answered."""
    of: int
    """Questions of the stage."""
    spent: int
    """Tokens spent now, of all stages."""


class Settings(NamedTuple):
    """What is labelled and judged."""

    seed: int = 0
    """Seed by which contexts and the features that are scored are drawn."""
    prefix: int | None = None
    """Size of the nested dictionary whose features are labelled; None for all."""
    scored: int | None = 500
    """Most features whose labels are scored, drawn at random; None for all, 0 for none."""
    simulation: bool = False
    """Whether labels are scored by simulation, too."""


class Labels(NamedTuple):
    """What came of it."""

    rows: list[FeatureLabel]
    """One for each feature with examples, ascending."""
    failures: dict[str, int]
    """Answers that could not be used, by reason."""
    requests: int
    """Questions that were answered."""
    yes: dict[tuple[LabelKind, str], tuple[int, int]]
    """By who made the label and the part that contexts are of: how often the judge said yes, and of how many."""
    finished: bool
    """Whether all was asked."""


def to_label(evidence: RunEvidence, settings: Settings) -> list[int]:
    """The features that are labelled, ascending: those with examples."""
    rows = evidence.rows
    return [j for j in range(min(settings.prefix or len(rows), len(rows))) if rows[j].samples]


def to_score(evidence: RunEvidence, settings: Settings) -> list[int]:
    """The features whose labels are scored, ascending."""
    features = to_label(evidence, settings)
    count = len(features) if settings.scored is None else settings.scored
    drawn = np.random.default_rng([settings.seed, 2]).permutation(features)[:count]
    return sorted(drawn.tolist())


class Labeller:
    """One labelling of one run's features."""

    def __init__(
        self, evidence: RunEvidence, explainer: tuple[Asked, Journal], judge: tuple[Asked, Journal], settings: Settings,
        budget: Budget, tell: Callable[[Progress], None] = lambda progress: None,
    ):  # fmt: skip
        self.evidence, self.settings, self.budget, self.tell = evidence, settings, budget, tell
        self._explainer, self._judge = explainer, judge
        self.features = to_label(evidence, settings)
        self._label: dict[int, str] = {}
        self._first: dict[int, str] = {}
        self._reason: dict[int, str] = {}
        self._time: dict[int, str] = {}
        self._scores: dict[int, list[LabelScore]] = defaultdict(list)
        self._not_scored: dict[int, str] = {}
        self._tokens: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self._failures: Counter[str] = Counter()
        self._requests = 0
        self._yes: dict[tuple[LabelKind, str], list[int]] = defaultdict(lambda: [0, 0])

    def run(self) -> Labels:
        """Ask all that was not asked before. Raises EndpointError where that can't be gone on with."""
        levels = self._levels()
        done = 0
        for level in levels:
            done = self._explain(level, EXPLAIN, done, len(self.features), again=False)
        parents = [[j for j in level if self._narrower(j)] for level in reversed(levels)]
        done, of = 0, sum(map(len, parents))
        for level in parents:
            done = self._explain(level, REVISE, done, of, again=True)
        self._score()
        rows = [self._row(j) for j in self.features]
        yes = {key: (hits, of) for key, (hits, of) in self._yes.items()}
        return Labels(rows, dict(self._failures.most_common()), self._requests, yes, not self.budget.exhausted)

    def _levels(self) -> list[list[int]]:
        """Features by the number of their ancestors."""
        rows = self.evidence.rows
        depth: dict[int, int] = {}
        for j in range(len(rows)):  # a parent comes before its children
            parent = rows[j].parent
            depth[j] = 0 if parent is None else depth[parent] + 1
        found: dict[int, list[int]] = defaultdict(list)
        for j in self.features:
            found[depth[j]].append(j)
        return [found[level] for level in sorted(found)]

    def _narrower(self, feature: int) -> list[str]:
        """The labels of its children."""
        return [self._label[c] for c in self.evidence.rows[feature].children if c in self._label]

    def _explain(self, features: Sequence[int], stage: str, done: int, of: int, again: bool) -> int:
        """Ask what some features respond to; returns how many of the stage are done."""

        def questions() -> Iterator[Question]:
            for j in features:
                parent = self.evidence.rows[j].parent
                broader = None if parent is None else self._label.get(parent)
                evidence = self.evidence.of(j)
                if again:
                    yield explain(evidence, broader, self._narrower(j), self._label.get(j))
                else:
                    yield explain(evidence, broader)

        for question, answer in self._ask(questions(), *self._explainer):
            done += 1
            self.tell(Progress(stage, done, of, self.budget.spent))
            j = question.feature
            try:
                label = read_label(self._count(question, answer))
            except UnusableAnswer as error:
                self._failures[str(error)] += 1
                self._reason.setdefault(j, str(error))
                continue
            if again and j in self._label:
                self._first[j] = self._label[j]
            self._label[j], self._time[j] = label, answer.time
            self._reason.pop(j, None)
        return done

    def _score(self) -> None:
        """Ask the judge about the labels of the features that are scored."""
        open_sheets: dict[Question, list[tuple[int, LabelKind, Sheet]]] = defaultdict(list)
        left: Counter[tuple[int, LabelKind]] = Counter()
        marks: dict[tuple[int, LabelKind], list[Marks]] = defaultdict(list)
        features = to_score(self.evidence, self.settings)
        per_feature = 1.0

        def questions() -> Iterator[Question]:
            nonlocal per_feature
            asked = 0
            for number, j in enumerate(features, 1):
                evidence = self.evidence.of(j)
                if evidence.too_little:
                    self._not_scored[j] = evidence.too_little
                    continue
                new: list[Question] = []
                for kind, label in self._labels(j):
                    own = sheets(evidence, label, self.settings.seed, self.settings.simulation)
                    left[j, kind] = len(own)
                    for sheet in own:
                        if sheet.question not in open_sheets:  # equal labels are judged once
                            new.append(sheet.question)
                        open_sheets[sheet.question].append((j, kind, sheet))
                asked += len(new)
                per_feature = asked / number
                yield from new

        for done, (question, answer) in enumerate(self._ask(questions(), *self._judge), 1):
            self.tell(Progress(JUDGE, done, max(done, round(per_feature * len(features))), self.budget.spent))
            targets = open_sheets.pop(question)
            try:
                text = self._count(question, answer)
                found = [mark(sheet, answer._replace(text=text)) for _, _, sheet in targets]
            except UnusableAnswer as error:
                self._failures[str(error)] += 1
                found = []
            for place, (j, kind, _) in enumerate(targets):
                marks[j, kind] += found[place : place + 1]
                left[j, kind] -= 1
                if not left[j, kind]:
                    self._close(j, kind, marks.pop((j, kind), []))

    def _close(self, feature: int, kind: LabelKind, marks: list[Marks]) -> None:
        """All questions about one label are answered."""
        found = scores(kind, marks)
        self._scores[feature] += found
        if not found:
            self._not_scored.setdefault(feature, "no answer that could be used")
        for part in marks:
            for item, said in zip(part.items, part.said, strict=True) if part.test == "detection" else ():
                counts = self._yes[kind, item.shown.context.part]
                counts[0] += said > 0.5
                counts[1] += 1

    def _labels(self, feature: int) -> list[tuple[LabelKind, str]]:
        """The labels of a feature that are judged."""
        found: list[tuple[LabelKind, str | None]] = [
            ("model", self._label.get(feature)), ("machine", self.evidence.rows[feature].machine_label),
        ]  # fmt: skip
        return [(kind, label) for kind, label in found if label]

    def _ask(self, questions: Iterable[Question], asked: Asked, journal: Journal) -> Iterator[tuple[Question, Answer]]:
        """The answers as they come, those that are known already among them; no more than the budget allows."""

        def new() -> Iterator[Asking]:
            for question in questions:
                if (answer := journal.get(question)) is not None:
                    yield Known(question, answer)
                    continue
                while self.budget.fits(question):
                    if self.budget.take(question):
                        yield question
                        break
                    yield None

        for question, answer in asked.answers(new()):
            journal.add(question, answer)
            self.budget.settle(question, answer)
            yield question, answer

    def _count(self, question: Question, answer: Answer) -> str:
        """The answer's text, its tokens counted. Raises UnusableAnswer where there is none."""
        if answer.failure:
            raise UnusableAnswer(answer.failure)
        self._requests += 1
        tokens = self._tokens[question.feature]
        tokens[0] += answer.prompt_tokens
        tokens[1] += answer.answer_tokens
        return answer.text

    def _row(self, feature: int) -> FeatureLabel:
        prompt_tokens, answer_tokens = self._tokens[feature]
        return FeatureLabel(
            feature=feature,
            label=self._label.get(feature),
            reason=None if feature in self._label else self._reason.get(feature),
            machine_label=self.evidence.rows[feature].machine_label,
            first_label=self._first.get(feature),
            model=self._explainer[0].model,
            prompts=prompts_version(),
            time=self._time.get(feature),
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
            scores=tuple(sorted(self._scores[feature], key=lambda score: (score.labels, score.test))),
            not_scored=self._not_scored.get(feature),
        )
