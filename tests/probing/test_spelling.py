"""Absorption counted on planted words with known answers; prompts and answers of a vocabulary made for the test."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mtc.config import load_preset
from mtc.language_model import LanguageModel, pack_windows
from mtc.probing import main_features, measure_spelling
from mtc.probing.absorption import Readings, absorption, measure_absorption
from mtc.probing.spelling import LINES, _prompts, read_words, spells, vocabulary_words
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

LETTERS = "abcde"


@pytest.fixture(scope="module")
def tokenizer():
    """Fewer tokens than the tiny model has; 40 words for each of five letters."""
    words = [f"Ġ{letter}{x}{y}" for letter in LETTERS for x in "klmnopqr" for y in "uvwxy"]
    others = ["<bos>", ":", "Ċ", "Ġhas", "Ġthe", "Ġfirst", "Ġletter", *(f"Ġ{chr(65 + i)}" for i in range(26))]
    vocabulary = {word: i for i, word in enumerate([*others, *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<bos>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>")


@pytest.fixture
def transcoder():
    transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 48), 8, "rms", skip=True), seed=1)
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=torch.Generator().manual_seed(2))
        transcoder.W_skip.normal_(generator=torch.Generator().manual_seed(3))
        transcoder.b_dec.fill_(0.3)
        transcoder.threshold.fill_(0.5)
        transcoder.target_scale.fill_(0.8)
    return transcoder


# Numbers ------------------------------------------------------------------------------------------------------------


def test_absorption_of_single_words():
    """Main feature 0; q = 10. Cosines: 1 and 2 aligned, 3 barely, 4 not at all."""
    cosines = np.array([0.9, 0.5, 0.2, 0.05, 0.0])
    words = {
        "main says all of it": ([10, 0, 0, 0, 0], 10, 0.0, False),
        "absorbed by 1": ([0, 8, 0, 0, 0], 10, 1.0, True),
        "by 1 and 2, neither of them alone": ([0, 3, 3, 0, 0], 10, 1.0, False),
        "by one too weak": ([0, 3.9, 0, 0, 0], 10, 0.0, False),
        "by 3, whose cosine is between the two limits": ([0, 0, 0, 8, 0], 10, 0.0, True),
        "by 4, which is not aligned": ([0, 0, 0, 0, 8], 10, 0.0, False),
        "half of it": ([5, 5, 0, 0, 0], 10, 0.5, False),
        "no more than what main leaves": ([6, 9, 0, 0, 0], 10, 0.4, False),
        "main speaks against it": ([-2, 8, 0, 0, 0], 10, 1.0, False),
        "the target does not say it": ([0, 8, 0, 0, 0], -1, 0.0, False),
    }
    contributions, projection, fraction, full = zip(*words.values(), strict=True)
    found = absorption(np.array(contributions, float), cosines, np.array(projection, float), [0])
    for i, name in enumerate(words):
        assert found.fraction[i] == pytest.approx(fraction[i]), name
        assert bool(found.full[i]) == full[i], name


def plant(absorbed: dict[str, int], seed: int):
    """60 words of each letter. Features 0..5 say the letters, 6 fires anywhere, 7..12 take a letter's place.

    The decoder writes a letter along its own axis; of `absorbed[letter]` words, the letter's feature is silent.
    """
    rng = np.random.default_rng(seed)
    letters = np.repeat(list("abcdef"), 60)
    features = np.zeros((360, 13), np.float32)
    for i, letter in enumerate("abcdef"):
        rows = np.flatnonzero(letters == letter)
        taken = rows[: absorbed.get(letter, 0)]
        features[rows, i] = rng.uniform(2, 3, 60)
        features[taken, i] = 0
        features[taken, 7 + i] = 2.5
    features[:, 6] = rng.uniform(0, 1, 360)
    decoder = np.zeros((13, 8))
    decoder[:6, :6] = decoder[7:, :6] = np.eye(6)
    decoder[7:, 7] = 0.3  # what else such a feature says
    decoder[6, 6] = 1
    base = 5.0
    target = (features @ decoder + rng.normal(size=(360, 8)) * 0.02).astype(np.float32)
    return Readings(target + np.float32(base), target, features), letters, decoder


@pytest.mark.parametrize("absorbed", [{}, {"a": 12, "d": 30}])
def test_planted_absorption_is_counted(absorbed):
    train, train_letters, decoder = plant({}, 0)
    test, test_letters, _ = plant(absorbed, 1)
    found = measure_absorption(train, test, train_letters, test_letters, decoder, (7, 13))
    assert min(found["probe_auc"].values()) > 0.99 and len(found["probe_auc"]) == 6
    assert "not_measured" not in found
    without, whole = found["prefixes"]
    for i, letter in enumerate(whole.letters):
        count = absorbed.get(letter.letter, 0)
        assert (letter.letter, letter.words, letter.main_features) == ("abcdef"[i], 60, (i,))
        assert letter.main_precision == 1
        assert letter.fully_absorbed == count
        assert letter.full_rate.value == letter.fraction.value == pytest.approx(count / 60)
        assert letter.main_f1 == pytest.approx(2 * (60 - count) / (120 - count))
        assert (letter.full_rate.low < count / 60 < letter.full_rate.high) or count == 0
    assert whole.with_feature == 6
    assert whole.full_rate.value == whole.fraction.value == pytest.approx(sum(absorbed.values()) / 360)
    # The first seven features have nothing that could take a letter's place.
    assert [letter.fully_absorbed for letter in without.letters] == [0] * 6
    assert without.full_rate.value == without.fraction.value == 0


def test_a_dictionary_without_letters_has_no_rate():
    train, train_letters, decoder = plant({}, 0)
    test, test_letters, _ = plant({}, 1)
    train.features[:, :6] = test.features[:, :6] = 0
    found = measure_absorption(train, test, train_letters, test_letters, decoder, (7, 13))
    assert found["not_measured"] == "the dictionary has features for 0 of 6 letters, at least 5 are needed"
    assert [(p.with_feature, p.full_rate, p.fraction) for p in found["prefixes"]] == [(0, None, None)] * 2

    noise = np.random.default_rng(3)
    blind = [part._replace(target=noise.normal(size=part.target.shape)) for part in (train, test)]
    found = measure_absorption(*blind, train_letters, test_letters, decoder, (7, 13))
    assert found["not_measured"].startswith("probes of the target find 0 letters")


def test_a_split_letter_has_two_main_features():
    rng = np.random.default_rng(4)
    positive = np.arange(200) < 100
    features = np.zeros((200, 6), np.float32)
    features[:60, 4] = features[60:100, 2] = 2
    features[:, 5] = rng.uniform(0, 2, 200)
    chosen, scores = main_features(features, positive, features)
    assert sorted(chosen) == [2, 4]
    assert ((scores > 0) == positive).all()


# The model ----------------------------------------------------------------------------------------------------------


class Speller:
    """Answers with the letter of the word five tokens before the colon's end, or with A, as a language model would."""

    def __init__(self, tokenizer, knows):
        self.names, self.knows, self.read = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), knows, []
        self.ids = tokenizer.get_vocab()

    def logits(self, windows, only):
        logits = torch.zeros(len(only), len(self.names))
        for row, place in enumerate(only.tolist()):
            text = [self.names[i] for i in windows.input_ids[place - 5 : place + 1].tolist()]
            assert text[1:] == ["Ġhas", "Ġthe", "Ġfirst", "Ġletter", ":"]
            self.read.append(text[0][1:])
            letter = text[0][1].upper() if text[0][1] in self.knows else "A"
            logits[row, self.ids[f"Ġ{letter}"]] = 1
        return logits


def test_words_are_shared_out_and_asked_once(tokenizer):
    words = vocabulary_words(tokenizer, 30)
    assert not set(words.train) & set(words.test)
    assert Counter(w[0] for w in words.train) == Counter(w[0] for w in words.test) == dict.fromkeys(LETTERS, 15)
    questions = words.test[:33]
    model = Speller(tokenizer, "acd")
    right = spells(model, tokenizer, words, questions, unit_tokens=400)
    assert model.read == questions
    assert right.tolist() == [word[0] in "acd" for word in questions]


def test_readings_are_of_the_words(tokenizer, transcoder):
    model = LanguageModel(load_preset("tiny").model)
    words = vocabulary_words(tokenizer, 40)
    wanted = words.test[:25]
    found = read_words(model, transcoder, tokenizer, words, wanted, unit_tokens=500)
    assert len(found.target) == 25

    # The same prompts, read one window at a time: the wanted words are the last LINES ones.
    at = 0
    for packed, places in _prompts(tokenizer, words, wanted, 1, 0):
        names = tokenizer.convert_ids_to_tokens(packed.input_ids.tolist())
        asked = [names[p][1:] for p in places]
        assert asked == wanted[at : at + LINES]
        before = [name[1:] for name, follows in pairwise(names) if follows == "Ġhas"][:LINES]
        assert len(before) == LINES and set(before) <= set(words.train)
        assert all(names[p + 6] == f"Ġ{names[p][1].upper()}" and names[p + 7] == "Ċ" for p in places)
        window = pack_windows([packed.input_ids.numpy().astype(np.int32)], [])
        (pair,) = model.capture(window)
        source, target = pair.source[places].float(), pair.target[places].float()
        rows = slice(at, at + len(places))
        np.testing.assert_allclose(found.target[rows], target, rtol=1e-3, atol=1e-4)
        features = transcoder.encode(source).detach()
        np.testing.assert_allclose(found.features[rows], features, rtol=1e-3, atol=1e-3)
        rebuilt = transcoder.decode(features, source).detach()
        added = found.features[rows] @ transcoder.W_dec.detach().numpy() / 0.8
        # rest = what the features should add: target - rebuilt = rest - added
        np.testing.assert_allclose(found.rest[rows] - added, target - rebuilt, rtol=1e-3, atol=1e-2)
        at += len(places)
    assert at == 25


def test_a_random_model_cannot_spell(tokenizer, transcoder, monkeypatch):
    config = load_preset("tiny").model
    found = measure_spelling(config, transcoder)
    assert found.not_measured == "the vocabulary has 0 letters with 40 words of one token, 5 are needed"
    assert found.accuracy is None

    monkeypatch.setattr("mtc.probing.spelling.load_tokenizer", lambda config: tokenizer)
    found = measure_spelling(config, transcoder, asked=60)
    assert found.asked == 60 and found.words == 204  # with those of the prompt itself
    assert found.accuracy.value < 0.4 and found.accuracy.low < found.chance
    assert found.not_measured.endswith("of the words' first letters, at least 50% needed")
    assert found.prefixes == () and found.probe_auc == {}
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_a_model_that_can_spell_is_measured(tokenizer, transcoder, monkeypatch):
    monkeypatch.setattr("mtc.probing.spelling.load_tokenizer", lambda config: tokenizer)
    monkeypatch.setattr("mtc.probing.spelling.spells", lambda *arguments: np.ones(len(arguments[3]), bool))
    found = measure_spelling(load_preset("tiny").model, transcoder)
    assert found.accuracy.value == 1
    assert set(found.probe_auc) == set(LETTERS)  # a random model's target knows words, not letters
    assert found.not_measured.startswith("probes of the target find")
