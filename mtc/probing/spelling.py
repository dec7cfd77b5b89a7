"""Can the language model spell, and does the transcoder's dictionary absorb features? On words' first letters.

In prompts of lines ` cat has the first letter: C`, the likeliest next token after the colon must be the right letter
for MIN_ACCURACY of the words. If it is, absorption.py measures how features share the letter at the words' tokens; if
not, nothing more is measured. Chanin et al. 2024, arXiv:2409.14507.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from mtc import language_model
from mtc.analysis import share
from mtc.analysis.intervals import Array
from mtc.config import ModelConfig
from mtc.language_model import PackedWindows, load_tokenizer, pack_windows
from mtc.probing.absorption import MIN_LETTERS, MIN_WORDS, Readings, measure_absorption
from mtc.results import MIN_ACCURACY, Spelling
from mtc.text import encode_text, special_ids, token_batches
from mtc.transcoder import MatryoshkaTranscoder

LINES = 10
"""Lines of a prompt with measured words, and as many lines of examples in front of them."""
MIDDLE = " has the first letter:"


class Words(NamedTuple):
    """Words of a vocabulary, in two halves with the same letters."""

    train: list[str]
    """Words that probes are fitted to: half of each letter's."""
    test: list[str]
    """Words that probes are judged on and the language model is asked for: the other half of each letter's."""
    token: dict[str, int]
    """Id of the single token that each word is, with its space."""


def measure_spelling(
    config: ModelConfig,
    transcoder: MatryoshkaTranscoder,
    *,
    device: str | torch.device = "cpu",
    at: int = 0,
    words_per_letter: int = 200,
    asked: int = 500,
    unit_tokens: int = 4096,
    seed: int = 0,
) -> Spelling:
    """Measure spelling and absorption in this process: the whole language model spells, then its lower part gives
    activations.

    `at` is the entry of `config.sites` that the transcoder belongs to. At most `words_per_letter` words of each letter
    are used, half of them to fit probes, and the model is asked for `asked` test words. Raises the errors of
    LanguageModel.
    """
    tokenizer = load_tokenizer(config)
    layer = config.sites[at].layer
    words = vocabulary_words(tokenizer, words_per_letter, seed)
    if reason := _unusable(words, tokenizer):
        return Spelling(layer=layer, words=len(words.token), asked=0, not_measured=reason)
    order = np.random.default_rng(seed).permutation(len(words.test))[:asked]
    questions = [words.test[i] for i in order]
    right = spells(
        language_model.LanguageModel(config, device, full=True), tokenizer, words, questions, unit_tokens, seed
    )
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
        reason = (
            f"the model spells {accuracy.value:.1%} of the words' first letters, at least {MIN_ACCURACY:.0%} needed"
        )
        return Spelling(**found, not_measured=reason)
    model = language_model.LanguageModel(config, device)
    transcoder = transcoder.to(device)
    train, test = (read_words(model, transcoder, tokenizer, words, w, unit_tokens, seed, at) for w in words[:2])
    decoder = transcoder.W_dec.detach().cpu().double().numpy() / float(transcoder.target_scale)
    letters = [np.array([word[0] for word in part]) for part in words[:2]]
    return Spelling(**found, **measure_absorption(train, test, letters[0], letters[1], decoder, transcoder.prefixes))


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
        half = len(same) // 2
        train += same[:half]
        test += same[half : 2 * half]
    return Words(train, test, token)


def spells(
    model: language_model.LanguageModel,
    tokenizer: Any,
    words: Words,
    questions: list[str],
    unit_tokens: int = 4096,
    seed: int = 0,
) -> Array:
    """[questions] bool: whether the whole model's likeliest next token is the right letter."""
    right = []
    for packed, places in _prompts(tokenizer, words, questions, unit_tokens, seed):
        after = torch.from_numpy(places) + len(_ids(tokenizer, MIDDLE))
        guessed = model.logits(packed, only=after).argmax(1).cpu()
        right.append((guessed == packed.input_ids[after + 1]).numpy())  # the prompt goes on with the answer
    return np.concatenate(right)


def read_words(
    model: language_model.LanguageModel,
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
    prompts: list[Array] = []
    places: list[Array] = []
    for at in range(0, len(wanted), LINES):
        asked = wanted[at : at + LINES]
        others = [words.train[i] for i in rng.permutation(len(words.train))[: 2 * LINES]]
        lines = [word for word in others if word not in asked][:LINES] + asked
        found = []
        ids = list(start)
        for word in lines:
            found.append(len(ids))
            ids += [words.token[word], *middle, *_ids(tokenizer, f" {word[0].upper()}"), *end]
        prompts.append(np.array(ids, np.int32))
        places.append(np.array(found[-len(asked) :]))
    for rows in token_batches([len(prompt) for prompt in prompts], unit_tokens):
        packed = pack_windows([prompts[i] for i in rows], special_ids(tokenizer))
        starts = np.cumsum(packed.lengths) - packed.lengths
        yield packed, np.concatenate([places[i] + first for i, first in zip(rows, starts, strict=True)])


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that stands behind a word: at the beginning of a text, many tokenizers put a space."""
    found = encode_text(f"a{text}", tokenizer)
    return found.ids[found.offsets[:, 0] > 0].tolist()


def _unusable(words: Words, tokenizer: Any) -> str | None:
    """Why this vocabulary does not do for spelling, or None."""
    first = [word[0] for word in words.test]
    letters = sum(first.count(letter) >= MIN_WORDS for letter in set(first))
    if letters < MIN_LETTERS:
        return f"the vocabulary has {letters} letters with {2 * MIN_WORDS} words of one token, {MIN_LETTERS} are needed"
    long = [a for a in string.ascii_uppercase if len(_ids(tokenizer, f" {a}")) != 1]
    return f"letters are not single tokens of the vocabulary: {', '.join(long)}" if long else None
