"""Feature absorption on first-letter spelling, after Chanin et al. 2024, arXiv:2409.14507, and SAEBench's version.

Absorption: a feature that seems to say "starts with S" stays silent on some words with S, because a more specific
feature (of the word "short") has taken over its direction. It is measured where the truth is known:

1. Can the model spell? In prompts of lines ` cat has the first letter: C`, its likeliest next token after the colon
   must be the right letter for at least MIN_ACCURACY of the words. If not, nothing more is measured.
2. For each letter, a logistic probe is fitted to the transcoder's *target* at the word's token, y [d_target].
3. The letter's main features are the k with the largest weights of an L1-penalised logistic regression, k as long as
   the F1 score of a probe of these k rises by more than F1_JUMP.
4. On test words of the letter that the probe finds, with p the probe's direction, |p| = 1, feature j contributes

       c_j = a_j (W_dec[j] . p) / target_scale      to      q = p . (y - base),

   base being what the transcoder adds without features: b_dec and the skip. A word is *fully absorbed* if no main
   feature is active, the feature with the largest c_j has cos(W_dec[j], p) >= FULL_COSINE, and its c_j >= SHARE q. Its
   *absorption fraction* is A / (A + M), M the main features' contributions, A those of up to MAX_ABSORBERS others with
   cosines of at least FRACTION_COSINE, as far as M leaves some of q; 0 if they are less than SHARE q, or M >= q.

Why the target: for an autoencoder, what is probed is what the dictionary rebuilds, so contributions add up to the
probe's projection. A transcoder rebuilds its target: there the same sum holds, while encoder directions only look at
the source and add up to nothing. Every nested dictionary is measured as a dictionary of its own.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from mtc.linear_probes import Array, Interval, fit_probe, grouped_folds, interval, require_sklearn, resample, share
from mtc.tokens import special_ids
from mtc.work import PackedWindows, pack_windows

if TYPE_CHECKING:
    from mtc.config import ModelConfig
    from mtc.language_model import LanguageModel
    from mtc.transcoder import MatryoshkaTranscoder

MIN_ACCURACY = 0.5
"""Share of right first letters from which on the model can spell."""
MIN_LETTERS = 5
"""Letters with enough words in the vocabulary for any of this, and that must be measured for a mean over letters."""
MIN_WORDS = 20
"""Test words of a letter, and of these those that the probe finds, that its absorption is measured on."""
MIN_PROBE_F1 = 0.6
"""F1 score from which on the target is said to know a letter."""
MAX_MAIN = 10
F1_JUMP = 0.03
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
SHARE = 0.4
MAX_ABSORBERS = 3
L1 = 0.01
"""Weight of the absolute coefficients beside the mean log loss, where features are ranked."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
LINES = 10
"""Lines of examples in front of the measured ones of a prompt, and number of those."""
MIDDLE = " has the first letter:"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class LetterAbsorption(_Part):
    """One letter, in one nested dictionary, on test words."""

    letter: str
    """The first letter."""
    words: int
    """Words with it that the probe of the target finds: those that absorption is measured on."""
    main_features: tuple[int, ...]
    """Features that stand for the letter."""
    main_f1: float
    """F1 score of a probe of these features. If it is low, the dictionary has no feature for the letter, and what is
    called absorbed was never there."""
    fully_absorbed: int
    """Words on which all of them are silent and one other feature takes their place."""
    full_rate: Interval
    """Share of such words, with Wilson's interval."""
    fraction: Interval
    """Mean absorption fraction, with the interval of bootstrap resamples of words."""


class PrefixAbsorption(_Part):
    """One nested dictionary."""

    prefix: int
    """Number of its features."""
    letters: tuple[LetterAbsorption, ...]
    """Letters that could be measured."""
    full_rate: Interval
    """Mean over letters of the share of fully absorbed words; interval of bootstrap resamples of words."""
    fraction: Interval
    """The same for the absorption fraction."""
    main_f1: float
    """Mean over letters."""


class Spelling(_Part):
    """First-letter spelling of a language model, and absorption in a transcoder."""

    layer: int
    """Layer whose MLP the transcoder imitates."""
    words: int
    """Words: single tokens of lower-case letters a to z, at least three, with a space in front."""
    asked: int
    """Test words that the language model was asked for."""
    accuracy: Interval
    """Share of these for which the likeliest next token is the right letter, with Wilson's interval."""
    chance: float
    """Share of them with the most frequent letter."""
    min_accuracy: float = MIN_ACCURACY
    """Accuracy from which on the model can spell."""
    probe_f1: dict[str, float] = {}
    """F1 score of each letter's probe of the target on test words; letters below MIN_PROBE_F1 are not measured."""
    prefixes: tuple[PrefixAbsorption, ...] = ()
    """Absorption in each nested dictionary."""
    not_measured: str | None = None
    """Why absorption was not measured, or None."""


class Words(NamedTuple):
    """Words of a vocabulary, in two halves with the same letters."""

    train: list[str]
    """Half of each letter's words."""
    test: list[str]
    """The other half."""
    token: dict[str, int]
    """The token of each word, with its space."""


class Absorbed(NamedTuple):
    """Absorption of some words of one letter."""

    fraction: Array
    """[words] float64, from 0 to 1."""
    full: Array
    """[words] bool."""


class Readings(NamedTuple):
    """What the transcoder reads, rebuilds and finds at the tokens of words."""

    target: Array
    """[words, d_target] float32, raw."""
    rest: Array
    """[words, d_target] float32: the target less what the transcoder adds without features."""
    features: Array
    """[words, features] float32."""


def measure_spelling(
    config: ModelConfig,
    transcoder: MatryoshkaTranscoder,
    *,
    device: str = "cpu",
    at: int = 0,
    words_per_letter: int = 200,
    asked: int = 500,
    unit_tokens: int = 4096,
    seed: int = 0,
) -> Spelling:
    """Measure both, in this process: the whole language model for spelling, then the lower part for activations.

    `at` is the entry of `config.sites` that the transcoder belongs to. At most `words_per_letter` words of each letter
    are used, half of them to fit probes, and the model is asked for `asked` test words. Raises ConfigError without
    scikit-learn and the errors of LanguageModel.
    """
    from mtc.language_model import LanguageModel
    from mtc.model_files import load_tokenizer

    require_sklearn()
    tokenizer = load_tokenizer(config)
    layer = config.sites[at].layer
    words = vocabulary_words(tokenizer, words_per_letter, seed)
    if reason := _unusable(words, tokenizer):
        nothing = share(0, 0)
        return Spelling(
            layer=layer, words=len(words.token), asked=0, accuracy=nothing, chance=nothing.value, not_measured=reason
        )
    order = np.random.default_rng(seed).permutation(len(words.test))[:asked]
    questions = [words.test[i] for i in order]
    right = spells(LanguageModel(config, device, full=True), tokenizer, words, questions, unit_tokens, seed)
    accuracy = share(int(right.sum()), len(right))
    first = [word[0] for word in questions]
    found: dict[str, Any] = {
        "layer": layer,
        "words": len(words.token),
        "asked": len(questions),
        "accuracy": accuracy,
        "chance": max(first.count(letter) for letter in set(first)) / len(first),
    }
    if accuracy.value < MIN_ACCURACY:
        reason = f"the model spells {accuracy.value:.1%} of the words' first letters, at least {MIN_ACCURACY:.0%} needed"
        return Spelling(**found, not_measured=reason)
    model = LanguageModel(config, device)
    transcoder = transcoder.to(device)
    train, test = (read_words(model, transcoder, tokenizer, words, w, unit_tokens, seed, at) for w in words[:2])
    decoder = transcoder.W_dec.detach().cpu().double().numpy() / float(transcoder.target_scale)
    letters = [np.array([word[0] for word in part]) for part in words[:2]]
    return Spelling(**found, **measure_absorption(train, test, letters[0], letters[1], decoder, transcoder.prefixes))


# Numbers ------------------------------------------------------------------------------------------------------------


def measure_absorption(
    train: Readings, test: Readings, train_letters: Array, test_letters: Array, decoder: Array, prefixes: Sequence[int]
) -> dict[str, Any]:
    """The fields `probe_f1`, `prefixes` and `not_measured` of a Spelling.

    Letters are [words] of one character each, `decoder` is [features, d_target] in raw units of the target.
    """
    probe_f1: dict[str, float] = {}
    measured: dict[int, list[tuple[LetterAbsorption, Absorbed]]] = {m: [] for m in prefixes}
    for letter in sorted(set(train_letters) & set(test_letters)):
        positive, wanted = train_letters == letter, test_letters == letter
        if min(positive.sum(), wanted.sum()) < MIN_WORDS:
            continue
        folds = grouped_folds(positive, np.arange(len(positive)), 3)
        fitted = fit_probe(train.target, positive, folds, STRENGTHS, balanced=True)
        yes = fitted.scores(test.target) > 0
        probe_f1[letter] = f1_score(yes, wanted)
        rows = np.flatnonzero(yes & wanted)
        if probe_f1[letter] < MIN_PROBE_F1 or len(rows) < MIN_WORDS:
            continue
        direction = fitted.weights / np.linalg.norm(fitted.weights)
        along = decoder @ direction
        cosines = along / np.maximum(np.linalg.norm(decoder, axis=1), 1e-30)
        projection = test.rest[rows].astype(np.float64) @ direction
        for m in prefixes:
            main, scores = main_features(train.features[:, :m], positive, test.features[:, :m])
            contributions = test.features[rows, :m] * along[:m]
            absorbed = absorption(contributions, cosines[:m], projection, main)
            full = int(absorbed.full.sum())
            fraction = absorbed.fraction
            measured[m].append((
                LetterAbsorption(
                    letter=letter,
                    words=len(rows),
                    main_features=tuple(main),
                    main_f1=f1_score(scores > 0, wanted),
                    fully_absorbed=full,
                    full_rate=share(full, len(rows)),
                    fraction=interval(float(fraction.mean()), _resampled_means(fraction)),
                ),
                absorbed,
            ))  # fmt: skip
    found: dict[str, Any] = {"probe_f1": probe_f1}
    count = len(measured[prefixes[0]])
    if count < MIN_LETTERS:
        reason = (
            f"a probe of the target finds {count} letters with an F1 score of at least {MIN_PROBE_F1} and "
            f"{MIN_WORDS} words, at least {MIN_LETTERS} letters needed"
        )
        return found | {"not_measured": reason}
    return found | {"prefixes": tuple(_mean_over_letters(m, measured[m]) for m in prefixes)}


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

    scale = np.maximum(train.max(0), 1e-30)
    rank = LogisticRegression(
        l1_ratio=1, solver="liblinear", C=1 / (L1 * len(train)), class_weight="balanced", random_state=0, max_iter=200
    ).fit(csr_matrix(train / scale), positive)
    order = np.argsort(-rank.coef_[0], kind="stable")[:MAX_MAIN]
    best, f1, scores = 0, -np.inf, np.empty(0)
    for k in range(1, len(order) + 1):
        chosen = order[:k]
        probe = LogisticRegression(class_weight="balanced", max_iter=1000)
        probe.fit(train[:, chosen] / scale[chosen], positive)
        new = f1_score(probe.decision_function(train[:, chosen] / scale[chosen]) > 0, positive)
        if new <= f1 + F1_JUMP:
            break
        best, f1, scores = k, new, probe.decision_function(test[:, chosen] / scale[chosen])
    return order[:best].tolist(), scores


def f1_score(said: Array, true: Array) -> float:
    """2 * right / (said + true), both [rows] bool; 0 if none is right."""
    return float(2 * (said & true).sum() / max(1, said.sum() + true.sum()))


def _resampled_means(values: Array) -> Array:
    """[resamples], means of bootstrap resamples of `values` [words]."""
    return resample(np.arange(len(values))) @ values / len(values)


def _mean_over_letters(prefix: int, measured: list[tuple[LetterAbsorption, Absorbed]]) -> PrefixAbsorption:
    letters = [letter for letter, _ in measured]
    means = []
    for values in ([a.full.astype(np.float64) for _, a in measured], [a.fraction for _, a in measured]):
        # Each letter's words are drawn with a seed of their own, so that letters are independent.
        draws = [resample(np.arange(len(v)), seed=i) @ v / len(v) for i, v in enumerate(values)]
        means.append(interval(float(np.mean([v.mean() for v in values])), np.mean(draws, axis=0)))
    return PrefixAbsorption(
        prefix=prefix,
        letters=tuple(letters),
        full_rate=means[0],
        fraction=means[1],
        main_f1=float(np.mean([letter.main_f1 for letter in letters])),
    )


# The model ----------------------------------------------------------------------------------------------------------


def vocabulary_words(tokenizer: Any, per_letter: int, seed: int = 0) -> Words:
    """At most `per_letter` words of each letter, drawn from those of the vocabulary."""
    token = {
        name[1:]: number
        for name, number in tokenizer.get_vocab().items()
        if name[0] in "Ġ▁" and len(name) >= 4 and set(name[1:]) <= set(string.ascii_lowercase)
    }
    rng = np.random.default_rng(seed)
    train, test = [], []
    for letter in string.ascii_lowercase:
        same = sorted(word for word in token if word[0] == letter)
        same = [same[i] for i in rng.permutation(len(same))[:per_letter]]
        train += same[: len(same) // 2]
        test += same[len(same) // 2 :]
    return Words(train, test, token)


def spells(
    model: LanguageModel, tokenizer: Any, words: Words, questions: list[str], unit_tokens: int = 4096, seed: int = 0
) -> Array:
    """[questions] bool: whether the whole model's likeliest next token is the right letter."""
    right = []
    for packed, places in _prompts(tokenizer, words, questions, unit_tokens, seed):
        after = torch.from_numpy(places) + len(_ids(tokenizer, MIDDLE))
        guessed = model.logits(packed, only=after).argmax(1).cpu()
        right.append((guessed == packed.input_ids[after + 1]).numpy())  # the prompt goes on with the answer
    return np.concatenate(right)


def read_words(
    model: LanguageModel,
    transcoder: MatryoshkaTranscoder,
    tokenizer: Any,
    words: Words,
    wanted: list[str],
    unit_tokens: int = 4096,
    seed: int = 0,
    at: int = 0,
) -> Readings:
    """Readings at the tokens of `wanted` words in spelling prompts."""
    parts = []
    for packed, places in _prompts(tokenizer, words, wanted, unit_tokens, seed):
        pair = model.capture(packed, torch.from_numpy(places))[at]
        with torch.inference_mode():
            target = pair.target.float()
            nothing = target.new_zeros(len(target), transcoder.prefixes[0])
            rest = target - transcoder.decode(nothing, pair.source)
            parts.append([t.cpu().numpy() for t in (target, rest, transcoder.encode(pair.source))])
    return Readings(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _prompts(
    tokenizer: Any, words: Words, wanted: list[str], unit_tokens: int, seed: int
) -> Iterator[tuple[PackedWindows, Array]]:
    """Prompts with LINES `wanted` words each behind LINES other training words, and where the wanted words' tokens are.

    Each wanted word is itself an example for the next: one pass reads LINES words instead of one.
    """
    middle, end = _ids(tokenizer, MIDDLE), _ids(tokenizer, "\n")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rng = np.random.default_rng(seed)
    windows: list[Array] = []
    places: list[int] = []
    total = 0
    for at in range(0, len(wanted), LINES):
        asked = wanted[at : at + LINES]
        others = [words.train[i] for i in rng.permutation(len(words.train))[: 2 * LINES]]
        lines = [word for word in others if word not in asked][:LINES] + asked
        ids = list(start)
        for i, word in enumerate(lines):
            if i >= len(lines) - len(asked):
                places.append(total + len(ids))
            ids += [words.token[word], *middle, *_ids(tokenizer, f" {word[0].upper()}"), *end]
        windows.append(np.array(ids, np.int32))
        total += len(ids)
        if total + len(ids) > unit_tokens or at + LINES >= len(wanted):
            yield pack_windows(windows, special_ids(tokenizer)), np.array(places)
            windows, places, total = [], [], 0


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _unusable(words: Words, tokenizer: Any) -> str | None:
    """Why this vocabulary does not do, or None."""
    first = [word[0] for word in words.test]
    letters = sum(first.count(letter) >= MIN_WORDS for letter in set(first))
    if letters < MIN_LETTERS:
        return (
            f"the vocabulary has {letters} letters with {2 * MIN_WORDS} words of one token, {MIN_LETTERS} are needed"
        )
    long = [a for a in string.ascii_uppercase if len(_ids(tokenizer, f" {a}")) != 1]
    return f"letters are not single tokens of the vocabulary: {', '.join(long)}" if long else None
