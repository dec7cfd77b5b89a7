"""An Analysis whose figures can be worked out by hand, with tokens that try to break out of the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mtc.analysis import Findings, LogitEffects
from mtc.analysis.analyse import analyse
from mtc.analysis.contexts import SCHEMA
from mtc.analysis.copies import FoundCopies
from mtc.analysis.examples import EDGES, Examples, FeatureStatistics, _Rows
from mtc.analysis.massive import MassiveSums
from mtc.analysis.nesting import Absorption, Nesting, Parents, Split
from mtc.config import RunConfig, load_preset
from mtc.results import (
    AllTokens,
    Analysis,
    Evaluation,
    LossRecovered,
    Massive,
    RunFacts,
    Slice,
    StraightLine,
    TokenCount,
)
from mtc.text import TokenTexts
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
from tests.strangers.tokenizers_as_they_come import named

GROUPS = (4, 6)
TOKENS = 1000
HOSTILE = ["|", "`code`", "\n", "<script>alert(1)</script>", "**", "a|b\n| c |", "$x$", "\u202eevil", " "]
VOCABULARY = [*HOSTILE, '"onload=alert(1) x="', "the", " of|"]
TEXTS = TokenTexts(named(VOCABULARY.__getitem__, len(VOCABULARY)))
COUNTS = [500, 40, 0, 7, 1, 0, 99, 100, 101, 3]  # features 2 and 5 are silent, 0 and 8 are dense
SAMPLES = [10, 10, 0, 7, 1, 0, 10, 10, 10, 0]  # feature 9 is weaker than min_activation
NONE = [0] * 10


def make_config(**overrides: Any) -> RunConfig:
    transcoder = {"group_sizes": list(GROUPS), "k": 4, "dead_after_tokens": 500} | overrides.pop("transcoder", {})
    analysis = {
        "num_tokens": 1000, "max_per_feature": 10, "num_top_features": 6, "num_random_features": 1,
    } | overrides.pop("analysis", {})  # fmt: skip
    return load_preset("tiny", {"transcoder": transcoder, "analysis": analysis, **overrides})


def make_transcoder(groups: tuple[int, ...] = GROUPS, d_target: int = 8) -> MatryoshkaTranscoder:
    transcoder = MatryoshkaTranscoder(TranscoderShape(8, d_target, groups, 4, "rms"))
    rows = torch.arange(1, sum(groups) + 1).float()
    transcoder.W_dec.data[:, 0] = rows  # row j has norm j + 1
    transcoder.threshold.fill_(0.25)
    transcoder.tokens_since_fired[:3] = torch.tensor([499, 500, 501])
    return transcoder


def make_statistics(counts: list[int] = COUNTS) -> FeatureStatistics:
    """Feature j's strongest activation is 1 + j / 2, its mean 0.5; all in bin 10, but its last one in bin 12."""
    count = np.array(counts, np.int64)
    maximum = np.where(count > 0, 1 + np.arange(len(count)) / 2, 0).astype(np.float32)
    histogram = np.zeros((len(count), len(EDGES) - 1), np.int64)
    histogram[:, 10] = (count - 1).clip(0)
    histogram[:, 12] = count.clip(max=1)
    return FeatureStatistics(count, maximum, count * 0.5, histogram, TOKENS)


def make_examples(samples: list[int] = SAMPLES) -> Examples:
    """Sample r of a feature peaks on token 0, except that r = 1 and r = 2 peak on token `feature % 9`."""
    columns: list[tuple[Any, ...]] = []
    for feature, n in enumerate(samples):
        for kind, many in (("top", n), ("sample", min(n, 2))):
            for rank in range(many):
                token = feature % len(HOSTILE) if rank in (1, 2) else 0
                quantile = np.nan if kind == "top" else 0.9 - rank / 2
                columns.append((feature, 1 + feature / 2 - rank / 50, kind == "top", rank, quantile, token))
    feature, activation, top, rank, quantile, token = map(np.array, zip(*columns, strict=True)) if columns else [[]] * 6
    ids = [VOCABULARY.index("the"), VOCABULARY.index(" of|")]
    strength = np.array(activation, np.float32)
    context = np.stack([strength * 0, strength, strength / 2], 1) if len(strength) else np.empty((0, 3), np.float32)
    n = len(strength)
    rows = _Rows(np.array(feature, np.int32), strength, np.arange(n), np.ones(n, np.int32), context)
    return Examples(
        rows, np.array(top, bool), np.array(rank, np.int32), np.array(quantile, np.float32), 1,
        lambda windows: [np.array([ids[0], token[w], ids[1]], np.int32) for w in windows],
        [], lambda windows: [f"doc|{w}<b>" for w in windows], TEXTS,
    )  # fmt: skip


def make_contexts() -> pa.Table:
    """Six contexts of three tokens; feature i fires on the second token of context i."""
    rows = [
        {
            "window_id": i, "document_id": f"doc|{i}<b>", "position": 1,
            "context_ids": [0, i, 1], "context_tokens": [VOCABULARY[0], VOCABULARY[i], VOCABULARY[1]],
            "feature": [i], "token": [1], "activation": [0.5 + i],
        }
        for i in range(6)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SCHEMA)


def make_massive(tokens: int = 20) -> Massive:
    """What `make_evaluation` says of massive tokens: 20, of which 15 are `the`; with 0, that there are none."""
    top = [TokenCount(token_id=VOCABULARY.index(t), token=t, count=n) for t, n in (("the", 15), ("|", 5))]
    return Massive(
        ratio=5.0, norm=123.4, in_weights=True, tokens=tokens,
        share=tokens / TOKENS, variance=0.5183 if tokens else 0.0,
        error=0.0131 if tokens else 0.0, l0=158.25 if tokens else None, first_positions=4,
        beyond_first=0.75 if tokens else None, different_ids=2 if tokens else 0,
        top_tokens=tuple(top) if tokens else (),
    )  # fmt: skip


def make_massive_sums(massive: bool = True) -> MassiveSums:
    """Features 8 and 0 fire on massive tokens: 8 with 0.9 of its activation, 0 with 0.1."""
    sums = MassiveSums.empty(len(VOCABULARY), 10)
    if massive:
        sums.tokens[VOCABULARY.index("the")] = 15
        sums.fired[[0, 8]] = 18, 20
        sums.activation[[0, 8]] = 0.1 * 250, 0.9 * 50.5
    return sums


def make_evaluation(
    prefixes: list[int], loss: bool = True, intervals: bool = True, massive: bool = False
) -> Evaluation:
    n = len(prefixes)
    fvu = [0.6, 0.4512345, 0.449][:n]
    ends = [(v - 0.02345678, v + 0.0312345) for v in fvu]
    measured = LossRecovered(
        tokens=400, documents=7, ce_clean=3.0, ce_zero=5.0, ce_mean=4.0, ce_spliced=[3.5123] * n, kl=[0.3214] * n,
        recovered_zero=[0.74385] * n, recovered_mean=[0.4877] * n,
        kl_interval=[(0.3, 0.35)] * n if intervals else None,
        recovered_zero_interval=[(0.7111, 0.7812)] * n if intervals else None,
        recovered_mean_interval=[(0.42, 0.55)] * n if intervals else None,
    )  # fmt: skip
    slices = [(1, 9, 120), (10, 99, 380), (100, 999, 500)]
    figures: dict[str, Any] = {
        "fvu": fvu, "fvu_interval": ends if intervals else None, "cosine": [0.61, 0.7512, 0.76][:n],
        "l0": [2.2, 4.4, 4.5][:n],
        "l0_interval": [(2.1, 2.3), (4.25, 4.61), (4.3, 4.7)][:n] if intervals else None,
    }  # fmt: skip
    of_all = figures | ({"fvu": [0.3, 0.2512, 0.22][:n], "l0": [3.1, 6.3, 6.4][:n]} if massive else {})
    return Evaluation(
        tokens=TOKENS, documents=9 if intervals else 3, prefixes=prefixes, **figures,
        all_tokens=AllTokens(**of_all), massive=make_massive(20 if massive else 0),
        line=StraightLine(fvu=0.62, added=1 - fvu[-1] / 0.62, all_tokens_fvu=0.5, all_tokens_added=0.4976, folds=5)
        if intervals else None,
        l0_counts=[20, 0, 80, 200, 300, 250, 100, 0, 50], never_fired=2,
        by_position=[
            Slice(low=2 * i, high=2 * i + 1, tokens=500 + i, fvu=[0.3 + i / 9] * n, cosine=[0.7] * n, l0=4.0 + i)
            for i in range(2)
        ],
        by_frequency=[
            Slice(low=a, high=b, tokens=t, fvu=[0.91 - i / 10] * n, cosine=[0.6 + i / 10] * n, l0=3.5 + i)
            for i, (a, b, t) in enumerate(slices)
        ],
        loss=measured if loss else None,
    )  # fmt: skip


def make_history(rows: int, slope: float = -1e-5, prefixes: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1, "tokens": (i + 1) * 256, "loss": 1.0, "fvu": [0.9 + slope * i * 256] * prefixes, "l0": 4.0,
            "dead": i // 10, "lr": 1e-3, "tokens_per_second": 1e4, "gradient_norm": 0.5,
        }
        for i in range(rows)
    ]  # fmt: skip


def make_facts(**changes: Any) -> RunFacts:
    facts = RunFacts(
        run_id="run_1", steps=32, trained_tokens=8192, data_name="addresses", documents={"train": 200, "heldout": 49},
        windows={"train": 900, "heldout": 50}, language_model_dtype="float32", devices=("cpu",), num_trainers=2,
        num_model_actors=1, seconds={"train": 12.5, "analyse": 3.25}, versions={"torch": "2.13.0"},
        data_fingerprint="feed" * 4, git_revision="0" * 40, hardware=("a processor, 2 CPUs",),
    )  # fmt: skip
    return facts.model_copy(update=changes)


def make_nesting() -> Nesting:
    """Features 6 and 7 are children of 1, feature 8 of 0; feature 9 fired too rarely."""
    parent = np.array([-1, -1, -1, -1, -1, -1, 1, 1, 0, -1])
    fired = np.array([400, 32, 0, 7, 1, 0, 80, 79, 81, 2])
    cosine, coactivation, base = (np.where(parent >= 0, v, np.nan) for v in (0.4321, 0.8765, 0.25))
    return Nesting(
        800, Parents(parent, cosine, coactivation, base, fired), [Split(1, (6, 7), 32, 0.75, 0.0625)],
        [Absorption(0, 8, 0.4, 20, 15)], 0.1, 10,
    )  # fmt: skip


def make_effects() -> LogitEffects:
    ids = np.tile(np.arange(10), (10, 1))
    values = np.tile(np.linspace(0.5, 0.05, 10, dtype=np.float32), (10, 1))
    counts = np.tile(np.eye(1, 24, 11, dtype=np.int32) * 118 + np.eye(1, 24, dtype=np.int32) * 10, (10, 1))
    return LogitEffects(ids, values, ids[:, ::-1], -values, counts)


def make_findings(transcoder: MatryoshkaTranscoder, **parts: Any) -> Findings:
    """Token 0 is too rare for a gain, token 3 gains 1.0 - 0.5, token 4 loses."""
    prefixes = list(transcoder.prefixes)
    errors = np.zeros((len(VOCABULARY), 1 + len(prefixes)))
    errors[0, :2], errors[3, :2], errors[4, :2] = (9, 90), (20, 40), (10, 10)
    if len(prefixes) > 1:
        errors[[0, 3, 4], 2] = 9, 20, 12
    found = {
        "evaluation": make_evaluation(prefixes), "statistics": make_statistics(), "examples": make_examples(),
        "token_errors": errors, "deviation": 2.0, "massive": make_massive_sums(False),
        "copies": FoundCopies(800, np.full(10, -1)), "nesting": make_nesting() if len(prefixes) > 1 else None,
        "effects": make_effects(), "contexts": make_contexts(),
    }  # fmt: skip
    return Findings(**(found | parts))


def make_analysis(config: RunConfig | None = None, **parts: Any) -> tuple[Analysis, pa.Table]:
    """The analysis and the table of all features; `parts` are other findings, or transcoder, history, facts."""
    transcoder = parts.pop("transcoder", None) or make_transcoder()
    history, facts = parts.pop("history", make_history(50)), parts.pop("facts", make_facts())
    return analyse(config or make_config(), transcoder, make_findings(transcoder, **parts), history, facts)


def bare_analysis() -> tuple[Analysis, pa.Table]:
    """Whatever may be missing is missing; no feature fired."""
    transcoder = make_transcoder((10,), d_target=6)
    evaluation = make_evaluation([10], loss=False, intervals=False).model_copy(
        update={"cosine": [], "l0_counts": [], "by_position": [], "by_frequency": []}
    )
    facts = make_facts(data_fingerprint="", git_revision=None, hardware=(), seconds={}, documents={}, windows={})
    return make_analysis(
        make_config(transcoder={"group_sizes": [10]}), transcoder=transcoder, evaluation=evaluation, effects=None,
        statistics=make_statistics(NONE), examples=make_examples(NONE), history=[], facts=facts,
    )  # fmt: skip
