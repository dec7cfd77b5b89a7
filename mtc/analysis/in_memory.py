"""The whole analysis of one transcoder in one process, for a notebook: what the job does with actors and a spool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from mtc.analysis.analyse import analyse
from mtc.analysis.contexts import choose_windows
from mtc.analysis.evaluation import loss_recovered
from mtc.analysis.examples import Examples
from mtc.analysis.findings import findings
from mtc.analysis.held_out import HeldOutPass, count_tokens, number_documents
from mtc.analysis.logits import LogitEffects, logit_effects
from mtc.analysis.loss_sums import LossSums, loss_sums
from mtc.analysis.straight_line import FOLDS
from mtc.config import RunConfig
from mtc.language_model import pack_windows
from mtc.results import Analysis, LossRecovered, RunFacts
from mtc.text import TokenTexts, Window, special_ids, token_batches
from mtc.transcoder import MatryoshkaTranscoder

if TYPE_CHECKING:
    from mtc.language_model import LanguageModel, PackedWindows


class Analysed(NamedTuple):
    """A transcoder's analysis and what belongs to it, as a run's files hold it."""

    analysis: Analysis
    """All figures of the report."""
    features: pa.Table
    """Every figure of every feature, one row each (`mtc.analysis.feature_table`)."""
    examples: Examples
    """Activating examples ordered by feature."""
    contexts: pa.Table
    """Random contexts with all features that fire in them (`mtc.analysis.contexts`)."""


def analyse_in_memory(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    model: LanguageModel,
    windows: Sequence[Window],
    tokenizer: Any,
    facts: RunFacts,
    history: Sequence[dict[str, Any]] = (),
) -> Analysed:
    """Analyse a transcoder on held-out windows, in their order, up to `analysis.num_tokens` tokens.

    With the whole language model (`LanguageModel(config.model, full=True)`) the first `analysis.loss_tokens` of them
    give loss recovered, too, and what features do to the logits is measured. `history` has a dict per logged step.
    """
    special = special_ids(tokenizer)
    windows = list(windows[: _until(windows, special, config.analysis.num_tokens)])
    ids = [np.asarray(window.input_ids, np.int32) for window in windows]
    numbers, num_documents = number_documents([window.document_id for window in windows])
    held = HeldOutPass(
        config, transcoder, count_tokens(ids, special, len(tokenizer)), num_documents,
        context_windows=choose_windows(np.arange(len(ids)), config.analysis.random_contexts, config.data.seed),
    )  # fmt: skip
    batches = token_batches([len(each) for each in ids], config.data.unit_tokens)
    packed = [pack_windows([ids[i] for i in batch], special) for batch in batches]
    sampled = 0
    for n, (batch, some) in enumerate(zip(batches, packed, strict=True)):
        (pair,) = model.capture(some, some.trainable.nonzero().squeeze(1))
        of_sample = sampled < config.analysis.coactivation_tokens
        held.add(np.asarray(batch), some, pair, numbers[batch.start : batch.stop], of_sample, n % FOLDS)
        sampled += len(pair.source)
    loss, effects = None, None
    if model.full and config.analysis.loss_tokens:
        loss, effects = _whole_model(config, held, model, packed, [numbers[b.start : b.stop] for b in batches])
    texts = TokenTexts(tokenizer)
    found = findings(
        held, loss, effects, num_documents, lambda chosen: [ids[i] for i in chosen], special,
        lambda chosen: [windows[i].document_id for i in chosen], texts,
    )  # fmt: skip
    return Analysed(*analyse(config, transcoder, found, list(history), facts), found.examples, found.contexts)


def _whole_model(
    config: RunConfig,
    held: HeldOutPass,
    model: LanguageModel,
    packed: Sequence[PackedWindows],
    documents: Sequence[np.ndarray],
) -> tuple[LossRecovered, LogitEffects]:
    """What the transcoder in the MLP's place costs, by document, and what each feature does to the logits."""
    mean, blocks = [torch.tensor(held.blocks.mean())], len(held.blocks.tokens) // 2
    losses: list[LossSums] = []
    seen = set[int]()
    tokens = 0
    for some, own in zip(packed, documents, strict=True):
        if tokens >= config.analysis.loss_tokens:
            break
        labels = torch.from_numpy(np.repeat(own, some.lengths) % blocks)
        losses += loss_sums(model, [held.transcoder], some, mean, labels, blocks)
        tokens += int(some.trainable.sum())
        seen |= set(own.tolist())
    loss = reduce(add, losses)
    effects = logit_effects(model, held.transcoder, 0, held.transcoder.num_features)
    scale = float(loss.norm_scale.sum() / loss.tokens.sum())
    return loss_recovered(loss, len(seen)), effects.scaled(scale)


def _until(windows: Sequence[Window], special: Sequence[int], tokens: int) -> int:
    """How many windows hold `tokens` trainable tokens; all if they hold fewer."""
    ends = np.cumsum([sum(i not in special for i in window.input_ids) for window in windows])
    return min(int(np.searchsorted(ends, tokens)) + 1, len(windows))
