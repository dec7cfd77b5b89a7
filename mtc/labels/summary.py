"""A labelling in sum, for the report: means with intervals, and how often the judge said yes to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mtc.analysis import interval, resample, share
from mtc.labels.evidence import FIFTHS
from mtc.labels.labelling import Labels, Settings
from mtc.labels.prompts import prompts_version
from mtc.results import (
    Difference,
    FeatureLabel,
    Interval,
    LabelKind,
    Labelling,
    LabelScore,
    LabelTest,
    ScoreSummary,
    YesShare,
)

KINDS: tuple[LabelKind, ...] = ("model", "machine")
TESTS: tuple[LabelTest, ...] = ("detection", "fuzzing", "simulation")
PARTS = ("random", "near miss", *map(str, range(1, FIFTHS + 1)))


def summarise(
    found: Labels, shown: Sequence[int], models: tuple[str, str], settings: Settings, analysed: str
) -> Labelling:
    """The record of a labelling.

    Args: `shown` are the features that the report shows in full; `models` explained and judged.
    """
    rows = found.rows
    by_label = {(kind, test): _values(rows, kind, test) for kind in KINDS for test in TESTS}
    own = set(shown)
    return Labelling(
        model=models[0],
        judge=models[1],
        prompts=prompts_version(),
        seed=settings.seed,
        features=len(rows),
        labelled=sum(row.label is not None for row in rows),
        revised=sum(row.first_label is not None for row in rows),
        finished=found.finished,
        failures=found.failures,
        requests=found.requests,
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
        scored=sum(bool(row.scores) for row in rows),
        not_scored=dict(Counter(row.not_scored for row in rows if row.not_scored is not None).most_common()),
        scores=tuple(
            ScoreSummary(
                labels=kind, test=test, features=len(values), mean=_mean([s.score.value for s in values.values()]),
                said_yes=None if test == "simulation" else float(np.mean([s.said_yes for s in values.values()])),
            )
            for (kind, test), values in by_label.items() if values
        ),
        differences=tuple(
            Difference(test=test, features=len(both), mean=_mean([m[j].score.value - r[j].score.value for j in both]))
            for test in TESTS
            for m, r in [(by_label["model", test], by_label["machine", test])]
            if (both := sorted(m.keys() & r.keys()))
        ),
        yes=tuple(
            YesShare(labels=kind, part=part, share=share(hits, of), contexts=of)
            for kind in KINDS for part in PARTS for hits, of in [found.yes.get((kind, part), (0, 0))] if of
        ),
        shown=tuple(row for row in rows if row.feature in own),
        analysed=analysed,
    )  # fmt: skip


def _values(rows: Sequence[FeatureLabel], kind: LabelKind, test: LabelTest) -> dict[int, LabelScore]:
    """The scores of one kind of label in one test by feature."""
    return {r.feature: s for r in rows for s in r.scores if (s.labels, s.test) == (kind, test)}


def _mean(values: Sequence[float]) -> Interval:
    """The mean with the interval of resamples of features."""
    array = np.array(values)
    weights = resample(np.arange(len(array)))
    return interval(float(array.mean()), weights @ array / len(array))
