"""Feature absorption after Chanin et al. 2024, arXiv:2409.14507, as SAEBench measures it, for a transcoder.

Absorption: a feature that seems to say "starts with S" stays silent on some words with S, because a more specific
feature, of the word "short", has taken over its direction. For each letter:

1. A logistic probe is fitted to the transcoder's *target* at the word's token, y [d_target].
2. The letter's main features are the k with the largest weights of an L1-penalised logistic regression, k growing as
   long as the F1 score of a probe of these k rises by more than F1_JUMP.
3. On test words of the letter that the first probe finds, with p its direction, |p| = 1, feature j contributes

       c_j = a_j (W_dec[j] . p) / target_scale      to      q = p . (y - base),

   base being what the transcoder adds without features: b_dec and the skip. A word is *fully absorbed* if q > 0, no
   main feature is active, and the feature with the largest c_j has cos(W_dec[j], p) >= FULL_COSINE and
   c_j >= SHARE q. Its *absorption fraction* is A / (A + M), M being the main features' contributions and A those of up
   to MAX_ABSORBERS others with cosines of at least FRACTION_COSINE, as far as M leaves some of q; it is 0 if these
   others make up less than SHARE q, or M >= q.

Why the target: for an autoencoder, what is probed is what the dictionary rebuilds, so that contributions add up to the
probe's projection. A transcoder rebuilds its target: there the same sum holds, while encoder directions belong to the
source, where activations add up to nothing. Every nested dictionary is measured as a dictionary of its own.

Unlike in SAEBench, a letter counts only where the dictionary has a feature for it: at least MIN_PRECISION of the test
words that a probe of the main features picks must have the letter. Where there is none, nothing can be absorbed, and a
rate near zero would flatter. Precision is asked for because absorption itself lowers the recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtc.analysis import interval, resample, share
from mtc.analysis.intervals import Array
from mtc.probing.linear_probes import auc, fit_probe, grouped_folds
from mtc.results import LetterAbsorption, PrefixAbsorption

MIN_LETTERS = 5
"""Fewest measured letters that a mean over letters is given for."""
MIN_WORDS = 20
"""Fewest test words of a letter, and of these fewest that the probe finds, that its absorption is measured on."""
MIN_AUC = 0.9
"""Area under the ROC curve of a letter's probe from which on the target is said to know the letter. SAEBench asks for
an F1 score of 0.6, which depends on how rare the letter is."""
MIN_PRECISION = 0.5
MAX_MAIN = 10
F1_JUMP = 0.03
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
SHARE = 0.4
MAX_ABSORBERS = 3
L1 = 0.01
"""Weight of the absolute coefficients beside the mean log loss, where features are ranked."""
STRENGTHS = (1e-3, 1e-2, 1e-1)


class Absorbed(NamedTuple):
    """Absorption of each of some words of one letter."""

    fraction: Array
    """[words] float64, absorption fraction of each word, from 0 to 1."""
    full: Array
    """[words] bool: the word is fully absorbed."""


class Readings(NamedTuple):
    """What the transcoder reads, rebuilds and finds at the tokens of words."""

    target: Array
    """[words, d_target] float32, target activations at the words' tokens, in raw units."""
    rest: Array
    """[words, d_target] float32, the target less what the transcoder adds without features, in raw units."""
    features: Array
    """[words, features] float32, feature activations at the words' tokens."""


def measure_absorption(
    train: Readings, test: Readings, train_letters: Array, test_letters: Array, decoder: Array, prefixes: Sequence[int]
) -> dict[str, Any]:
    """The fields `probe_auc`, `prefixes` and `not_measured` of a Spelling.

    Letters are [words] of one character each, `decoder` is [features, d_target] in raw units of the target.
    """
    from sklearn.metrics import f1_score

    probe_auc: dict[str, float] = {}
    measured: dict[int, list[tuple[LetterAbsorption, Absorbed]]] = {m: [] for m in prefixes}
    for letter in sorted(set(train_letters) & set(test_letters)):
        positive, wanted = train_letters == letter, test_letters == letter
        if min(positive.sum(), wanted.sum()) < MIN_WORDS:
            continue
        folds = grouped_folds(positive, np.arange(len(positive)), 3)
        fitted = fit_probe(train.target, positive, folds, STRENGTHS, balanced=True)
        scores = fitted.scores(test.target)
        probe_auc[letter] = float(auc(scores, wanted))
        rows = np.flatnonzero((scores > 0) & wanted)
        if probe_auc[letter] < MIN_AUC or len(rows) < MIN_WORDS:
            continue
        direction = fitted.weights / np.linalg.norm(fitted.weights)
        along = decoder @ direction
        cosines = along / np.maximum(np.linalg.norm(decoder, axis=1), 1e-30)
        projection = test.rest[rows].astype(np.float64) @ direction
        for m in prefixes:
            main, of_main = main_features(train.features[:, :m], positive, test.features[:, :m])
            contributions = test.features[rows, :m] * along[:m]
            absorbed = absorption(contributions, cosines[:m], projection, main)
            full = int(absorbed.full.sum())
            fraction = absorbed.fraction
            picked = of_main > 0
            measured[m].append((
                LetterAbsorption(
                    letter=letter,
                    words=len(rows),
                    main_features=tuple(main),
                    main_precision=float((picked & wanted).sum() / max(1, picked.sum())),
                    main_f1=float(f1_score(wanted, picked)),
                    fully_absorbed=full,
                    full_rate=share(full, len(rows)),
                    fraction=interval(float(fraction.mean()), _resampled_means(fraction)),
                ),
                absorbed,
            ))  # fmt: skip
    found: dict[str, Any] = {"probe_auc": probe_auc}
    count = len(measured[prefixes[0]])
    if count < MIN_LETTERS:
        reason = (
            f"probes of the target find {count} letters with an AUC of at least {MIN_AUC} and {MIN_WORDS} words, "
            f"at least {MIN_LETTERS} letters needed"
        )
        return found | {"not_measured": reason}
    found["prefixes"] = tuple(_mean_over_letters(m, measured[m]) for m in prefixes)
    most = max(part.with_feature for part in found["prefixes"])
    if most < MIN_LETTERS:
        found["not_measured"] = (
            f"the dictionary has features for {most} of {count} letters, at least {MIN_LETTERS} are needed"
        )
    return found


def absorption(contributions: Array, cosines: Array, projection: Array, main: Sequence[int]) -> Absorbed:
    """Absorption of words that the probe finds.

    Args: `contributions` [words, features] of each feature to `projection` [words], 0 where it is silent; `cosines`
    [features] of decoder rows and probe; `main` features of the letter.
    """
    is_main = np.zeros(len(cosines), dtype=bool)
    is_main[list(main)] = True
    silent = (contributions[:, is_main] == 0).all(1)
    top = contributions.argmax(1)
    largest = contributions[np.arange(len(contributions)), top]
    full = silent & (projection > 0) & (cosines[top] >= FULL_COSINE) & (largest >= SHARE * projection)

    mains = contributions[:, is_main].sum(1)
    others = np.where(~is_main & (cosines >= FRACTION_COSINE) & (contributions > 0), contributions, 0.0)
    absorbers = -np.sort(-others, axis=1)[:, :MAX_ABSORBERS].sum(1)
    possible = (projection > 0) & (mains < projection) & (absorbers >= SHARE * projection)
    taken, mains = np.minimum(absorbers, projection - mains)[possible], np.maximum(mains, 0)[possible]
    fraction = np.zeros(len(projection))
    fraction[possible] = taken / (taken + mains)
    return Absorbed(fraction, full)


def main_features(train: Array, positive: Array, test: Array) -> tuple[list[int], Array]:
    """The features that stand for a class, strongest first, and scores [test rows] of a probe of them.

    `train` [words, features] with `positive` [words] bool chooses them and fits the probe; one feature at least.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from threadpoolctl import threadpool_limits

    scale = np.maximum(train.max(0), 1e-30)
    with threadpool_limits(1):  # threads cost more than they save on such small products
        rank = LogisticRegression(
            l1_ratio=1,
            solver="liblinear",
            C=1 / (L1 * len(train)),
            class_weight="balanced",
            random_state=0,
            max_iter=200,
        ).fit(csr_matrix(train / scale), positive)
        order = np.argsort(-rank.coef_[0], kind="stable")[:MAX_MAIN]
        best, f1, scores = 0, -np.inf, np.empty(0)
        for k in range(1, len(order) + 1):
            chosen = order[:k]
            probe = LogisticRegression(class_weight="balanced", max_iter=1000)
            probe.fit(train[:, chosen] / scale[chosen], positive)
            new = f1_score(positive, probe.decision_function(train[:, chosen] / scale[chosen]) > 0)
            if new <= f1 + F1_JUMP:
                break
            best, f1, scores = k, new, probe.decision_function(test[:, chosen] / scale[chosen])
    return order[:best].tolist(), scores


def _resampled_means(values: Array) -> Array:
    """[resamples], means of bootstrap resamples of `values` [words]."""
    return resample(np.arange(len(values))) @ values / len(values)


def _mean_over_letters(prefix: int, measured: list[tuple[LetterAbsorption, Absorbed]]) -> PrefixAbsorption:
    present = [absorbed for letter, absorbed in measured if letter.main_precision >= MIN_PRECISION]
    means = []
    for values in ([a.full.astype(np.float64) for a in present], [a.fraction for a in present]):
        # Each letter's words are drawn with a seed of their own, so that letters are independent.
        draws = [resample(np.arange(len(v)), seed=i) @ v / len(v) for i, v in enumerate(values)]
        few = len(values) < MIN_LETTERS
        means.append(None if few else interval(float(np.mean([v.mean() for v in values])), np.mean(draws, axis=0)))
    return PrefixAbsorption(
        prefix=prefix,
        letters=tuple(letter for letter, _ in measured),
        with_feature=len(present),
        full_rate=means[0],
        fraction=means[1],
    )
