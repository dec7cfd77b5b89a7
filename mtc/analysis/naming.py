"""Labels of features without a language model: what a feature's strongest examples have in common.

A label names the tokens at the examples' peaks: one token and the phrase around it, few tokens, or a class of them; or
it says that there is `no single token`, and which are the commonest. Unless it is one token, it also tells what stands
before or after most peaks, else the context words that are commoner there than chance has it. Shares are of all the
feature's samples, and of fewer than 10 of them counts. A label is data out of other people's texts: whoever shows it
escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtc.analysis.examples import Examples
from mtc.analysis.tally import commonest, tally
from mtc.analysis.word_forms import KINDS, PIECE, WordForms, word_forms

Array = NDArray[Any]
CHUNK = 1 << 14
"""Samples whose contexts are read at a time; a few more where a feature's samples would be cut apart."""
SHARED = 0.5
"""Share of the samples that have a token, a phrase or a neighbour in common, at least, for it to be named."""
FEW, FEW_SHARE = 3, 0.7
"""Most tokens that are named where there is no single one, and the share of the samples that they cover at least."""
KIND_SHARE = 0.8
"""Share of the peaks that are of one class, at least, for it to be named."""
PHRASE = 5
"""Most tokens of a phrase."""
MIN_TOGETHER = 3
"""Fewest samples that make a phrase, a neighbour or a context word, or a token common: fewer are no pattern."""
NEAR, NEAR_SHARE, MIN_LIFT = 3, 0.1, 3.0
"""Most context words that are named; the share of the samples that hold one, at least; and how many times what the
word's frequency predicts that is, at least."""
PERCENT_SAMPLES = 10
"""Fewest samples of which shares are told in per cent."""
TOKEN_CHARS, PHRASE_CHARS, LABEL_CHARS = 24, 60, 160
"""Most characters of a token and of a phrase inside their quotes, and of a label."""


def machine_labels(examples: Examples, counts: Array, features: int) -> list[str | None]:
    """A label for each of so many features; None for one without samples.

    Args: counts [vocabulary], how often each token id occurs in the text that the examples are from.
    """
    forms = word_forms(examples.texts, counts)
    labels: list[str | None] = [None] * features
    for samples in _chunks(examples, forms):
        peaks = _peaks(samples)
        for index, *parts in zip(
            samples.features.tolist(), _heads(samples, peaks), _tails(samples, peaks), strict=True
        ):
            label = "".join(parts)
            labels[index] = label if len(label) <= LABEL_CHARS else label[: LABEL_CHARS - 1] + "…"
    return labels


class _Samples(NamedTuple):
    """The samples of some features, the strongest of each first."""

    examples: Examples
    forms: WordForms
    features: Array  # [features] int64
    feature: Array  # [samples] int64, place in `features`
    size: Array  # [features] int64, samples of each
    token: Array  # [samples, context] int32
    word: Array  # [samples, context] int64, -1 where there is no token
    peak: int  # column of the peaks

    @property
    def together(self) -> Array:
        """[features], samples that must have something in common."""
        return np.maximum(SHARED * self.size, MIN_TOGETHER)

    def at(self, column: Array | int) -> tuple[Array, Array]:
        """[samples] ids in a column, or in one for each sample, and whether there is a token."""
        rows, inside = np.arange(len(self.token)), (column >= 0) & (column < self.token.shape[1])
        column = np.where(inside, column, 0)
        return self.token[rows, column], inside & (self.word[rows, column] >= 0)

    def spelling(self, column: int, word: Array) -> Array:
        """[features] id with which each feature's word [features] stands most often in this column."""
        token, there = self.at(column)
        there &= self.forms.word[token] == word[self.feature]
        return commonest(self.feature[there], token[there], len(self.features))[0]

    def quoted(self, token_id: int) -> str:
        return _quoted(self.examples.token(token_id), TOKEN_CHARS)


class _Peaks(NamedTuple):
    """What is at the peaks."""

    word: Array  # [FEW, features] int64, the commonest words, -1 where there are fewer
    times: Array  # [FEW, features] int64, samples that peak on each
    token: Array  # [FEW, features] int64, most frequent spelling of each
    named: Array  # [features] int64, how many of them the label names
    single: Array  # [features] bool, the feature is of one token
    few: Array  # [features] bool, the feature is of one token or of few
    kind: Array  # [features] int64, the class of the peaks, 0 if the feature is of no class or of few tokens
    of_kind: Array  # [features] int64, how many peaks are of the commonest class


def _chunks(examples: Examples, forms: WordForms) -> Iterator[_Samples]:
    top = np.flatnonzero(examples.is_top)
    feature = examples.feature[top]
    start = 0
    while start < len(top):
        end = int(np.searchsorted(feature, feature[min(start + CHUNK, len(top)) - 1], "right"))
        features, place, size = np.unique(feature[start:end], return_inverse=True, return_counts=True)
        token, inside, peak = examples.contexts(top[start:end])
        yield _Samples(examples, forms, features, place, size, token, np.where(inside, forms.word[token], -1), peak)
        start = end


def _peaks(samples: _Samples) -> _Peaks:
    size = samples.size
    word, times, token = np.full((FEW, len(size)), -1), *np.zeros((2, FEW, len(size)), np.int64)
    found = tally(samples.feature, samples.word[:, samples.peak])
    for place in range(FEW):
        here = found.place == place
        word[place, found.group[here]], times[place, found.group[here]] = found.value[here], found.times[here]
        token[place] = samples.spelling(samples.peak, word[place])
    single = (times[0] >= SHARED * size) & (times[0] > times[1])
    enough = np.cumsum(times, 0) >= FEW_SHARE * size
    few = single | enough.any(0)
    kind, of_kind = _kinds(samples)
    kind = np.where(~few & (of_kind >= KIND_SHARE * size), kind, 0)
    common = np.where(kind > 0, 0, (times >= MIN_TOGETHER).sum(0))
    named = np.where(single, 1, np.where(few, enough.argmax(0) + 1, common))
    return _Peaks(word, times, token, named, single, few, kind, of_kind)


def _heads(samples: _Samples, peaks: _Peaks) -> Iterator[str]:
    """What the peaks of each feature are."""
    phrase, in_phrase = _phrases(samples, peaks)
    for f, n in enumerate(samples.size.tolist()):
        named, kind = int(peaks.named[f]), int(peaks.kind[f])
        tokens = ", ".join(samples.quoted(int(token)) for token in peaks.token[:named, f])
        tokens += _share(peaks.times[:named, f].sum(), n)
        if peaks.few[f]:
            ids = phrase[f][phrase[f] >= 0].tolist()
            text = _quoted("".join(samples.examples.texts.sequence(ids)), PHRASE_CHARS)
            yield tokens + (f" in {text}{_share(in_phrase[f], n)}" if len(ids) > 1 else "")
        elif kind:
            yield KINDS[kind] + _share(peaks.of_kind[f], n)
        else:
            yield "no single token" + (f"; most often {tokens}" if named else "")


def _kinds(samples: _Samples) -> tuple[Array, Array]:
    """[features] commonest kind of the peaks, and how many samples have it."""
    forms = samples.forms
    (token, _), (before, there) = samples.at(samples.peak), samples.at(samples.peak - 1)
    kind = np.where(there & forms.ends_in_letter[before] & forms.begins_bare[token], PIECE, forms.kind[token])
    some = kind > 0
    return commonest(samples.feature[some], kind[some], len(samples.features))


def _phrases(samples: _Samples, peaks: _Peaks) -> tuple[Array, Array]:
    """[features, 2 * PHRASE - 1] ids of the longest phrase around each single token, -1 where it is shorter, and how
    many samples have it. It grows by the commonest neighbour at either side, the left one of equals."""
    feature, groups, middle = samples.feature, len(samples.features), PHRASE - 1
    phrase = np.full((groups, 2 * PHRASE - 1), -1)
    phrase[peaks.single, middle] = peaks.token[0, peaks.single]
    grows, have = peaks.single.copy(), peaks.times[0].copy()
    alike = grows[feature] & (samples.word[:, samples.peak] == peaks.word[0, feature])
    ends = np.zeros((2, groups), np.int64)  # of the phrase, from the peak
    for _ in range(PHRASE - 1):
        reach = ends + np.array([[-1], [1]])
        sides = []
        for side in reach:
            token, there = samples.at(samples.peak + side[feature])
            there &= alike & grows[feature]
            sides.append(commonest(feature[there], token[there], groups))
        (left, many), (right, more) = sides
        to_right = more > many
        token_id, times = np.where(to_right, right, left), np.where(to_right, more, many)
        grows &= times >= samples.together
        step = np.where(to_right, reach[1], reach[0])
        token, there = samples.at(samples.peak + step[feature])
        alike &= ~grows[feature] | (there & (token == token_id[feature]))
        phrase[grows, middle + step[grows]] = token_id[grows]
        have[grows] = times[grows]
        ends[0, grows & ~to_right] -= 1
        ends[1, grows & to_right] += 1
    return phrase, have


def _tails(samples: _Samples, peaks: _Peaks) -> list[str]:
    """What is around the peaks of each feature that has no single token; empty where nothing is to be named."""
    feature, groups = samples.feature, len(samples.features)
    tails = [""] * groups
    for name, column in (("after", samples.peak - 1), ("before", samples.peak + 1)):
        token, there = samples.at(column)
        there &= ~peaks.single[feature]
        word, times = commonest(feature[there], samples.forms.word[token[there]], groups)
        spelled = samples.spelling(column, word)
        for f in np.flatnonzero(times >= samples.together).tolist():
            tails[f] += f"; {name} {samples.quoted(int(spelled[f]))}{_share(times[f], samples.size[f])}"
    lonely = np.array([not tail for tail in tails]) & ~peaks.single
    for f, word in zip(*_near(samples, peaks, lonely), strict=True):
        text = samples.quoted(int(samples.forms.spelling[word]))
        tails[f] += f", {text}" if tails[f] else f"; near {text}"
    return tails


def _near(samples: _Samples, peaks: _Peaks, wanted: Array) -> tuple[Array, Array]:
    """The context words of the wanted features [features]: places of the features, ascending, and words, the best
    first. A word's lift is the number of samples that hold it around the peak, over what its share s of all tokens
    predicts: 1 - (1 - s)^c of them, with c context tokens in the mean. They are ranked by number * log(lift)."""
    rows = np.flatnonzero(wanted[samples.feature])
    feature, word = samples.feature[rows], samples.word[rows]
    tokens = (word >= 0).sum(1) - 1  # without the peak
    context = np.bincount(feature, weights=tokens, minlength=len(wanted)) / samples.size
    word[~samples.forms.is_word[samples.token[rows]]] = -1
    word[:, samples.peak] = -1
    for place, named in enumerate(peaks.word):
        word[(word == named[feature][:, None]) & (peaks.named[feature] > place)[:, None]] = -1
    word.sort(axis=1)
    new = word >= 0
    new[:, 1:] &= word[:, 1:] != word[:, :-1]
    pairs, times = np.unique(feature[np.nonzero(new)[0]] << 32 | word[new], return_counts=True)
    feature, word = pairs >> 32, pairs & 0xFFFFFFFF
    size = samples.size[feature]
    lift = times / (size * (1 - (1 - samples.forms.share[word]) ** context[feature]))
    good = (lift >= MIN_LIFT) & (times >= np.maximum(NEAR_SHARE * size, MIN_TOGETHER))
    feature, word, score = feature[good], word[good], (times * np.log(lift))[good]
    order = np.lexsort((word, -score, feature))
    feature, word = feature[order], word[order]
    best = np.arange(len(feature)) - np.searchsorted(feature, feature) < NEAR
    return feature[best], word[best]


def _share(times: int, size: int) -> str:
    return f" ({times} of {size})" if size < PERCENT_SAMPLES else f" ({100 * times / size:.0f} %)"


def _quoted(text: str, most: int) -> str:
    """The text in quotes and on one line, cut to so many characters."""
    if len(repr(text)) <= most + 2:
        return repr(text)
    while len(repr(text)) > most + 1:
        text = text[:-1]
    return repr(text + "…")
