"""From the sums of a pass over held-out text to what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mtc.analysis.analyse import Findings
from mtc.analysis.coactivation import Array
from mtc.analysis.copies import find_copies
from mtc.analysis.evaluation import evaluation
from mtc.analysis.held_out import HeldOutPass
from mtc.analysis.logits import LogitEffects
from mtc.analysis.nesting import analyse_nesting
from mtc.results import LossRecovered
from mtc.text import TokenTexts


def findings(
    held: HeldOutPass,
    loss: LossRecovered | None,
    effects: LogitEffects | None,
    num_documents: int,
    windows: Callable[[Array], Sequence[Array]],
    special: Sequence[int],
    document_ids: Callable[[Array], Sequence[str]],
    texts: TokenTexts,
) -> Findings:
    """What a whole pass found; the last four arguments are those of ExampleCollector.examples."""
    about = (windows, special, document_ids, texts)
    return Findings(
        evaluation=evaluation(held, loss, num_documents, texts.token),
        statistics=held.examples.statistics,
        examples=held.examples.examples(*about),
        token_errors=held.token_errors,
        deviation=held.blocks.halves()[0].mean_deviation(),
        massive=held.massive,
        copies=find_copies(held.transcoder, held.sample),
        nesting=analyse_nesting(held.transcoder, held.sample, held.candidates),
        effects=effects,
        contexts=held.contexts.table(*about),
    )
