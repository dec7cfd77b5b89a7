"""Labels of planted features, worked out by hand."""

import numpy as np
import pytest

from mtc.analysis.examples import ExampleCollector
from mtc.analysis.naming import machine_labels
from mtc.analysis.token_sums import SparseActivations
from mtc.language_model import pack_windows
from mtc.text import TokenTexts, encode_text
from tests.strangers.tokenizers_as_they_come import gpt2, llama2, named, wordpiece

BOS = 0
TOWNS = [" Texas", " Paris", " Rome", " Lyon", " Oslo", " Bern", " Riga", " Lima"]
NUMBERS = [" 12", "1990", " 7,000", " ½", "3", " 4", " 1,5", "66"]
PIECES = ["gress", "ing", "Wise", "ed", "tion", "ness", "é", "s"]
MARKS = [".", ",", " (", ")", " —", '"', "!", "?"]
BREAKS = ["\n", "\n\n", " \n", "\r\n", "\n ", "\n\n\n", "\t\n", "\n\t"]
SPACES = ["  ", "\t", "    ", "\t\t", "   ", " \t", " " * 5, "\r"]
WORDS = ["<s>", " the", " of", " Congress", " congress", " States", " United", " he", " she", " they", " Con", " war"]
WORDS += [" army", " peace", " navy", " President", "x" * 50, "\u202e'", "<script>|`", *TOWNS, *NUMBERS, *PIECES]
VOCABULARY = [*WORDS, *MARKS, *BREAKS, *SPACES, *(f" filler{i}" for i in range(60))]
ID = {text: i for i, text in enumerate(VOCABULARY)}
FILLER = VOCABULARY[-60:]
COUNTS = {" the": 1200, " of": 1000, " war": 20, " army": 10, " peace": 5, " navy": 150, ".": 5}


def make(features, parts=1, order=1, tokenizer=None):
    """Examples of features: each a list of (tokens before, peak, tokens after), the strongest first, gathered in so
    many parts that are merged, from the first window on (order 1) or from the last (-1)."""
    windows, fires = [], []
    for j, samples in enumerate(features):
        for rank, (before, peak, after) in enumerate(samples):
            ids = [t if isinstance(t, int) else ID[t] for t in (*before, peak, *after)]
            windows.append(np.array([BOS, *ids], np.int32))
            trained = [i for i in ids if i != BOS]
            fires.append((j, trained.index(ids[len(before)], len([t for t in before if t != BOS])), 100 - rank / 10))
    collectors = [ExampleCollector(len(features), 100, 3, 20, 0.1) for _ in range(parts)]
    for n in range(len(windows))[::order]:
        feature, place, value = fires[n]
        fired = SparseActivations(np.array([feature]), np.array([place]), np.array([value], np.float32))
        collectors[n % parts].add(np.array([n]), pack_windows([windows[n]], [BOS]), fired)
    first, *rest = collectors[::order]
    for other in rest:
        first.merge_arrays(other.arrays())
    texts = TokenTexts(tokenizer or named(VOCABULARY.__getitem__, len(VOCABULARY)))
    return first.examples(lambda i: [windows[w] for w in i], [BOS], lambda i: ["document"] * len(i), texts)


def labels(*features, **how):
    counts = np.array([COUNTS.get(text, 1) for text in VOCABULARY])
    return machine_labels(make(features, **how), counts, len(features))


def label(*samples):
    return labels(list(samples))[0]


def plain(*peaks):
    """Samples with these peaks, and around each what no other one has."""
    return [([FILLER[2 * i]], peak, [FILLER[2 * i + 1]]) for i, peak in enumerate(peaks)]


def test_one_token_whatever_its_case_and_space():
    peaks = [" Congress"] * 6 + [" congress"] * 4 + [" war", " army"]
    assert label(*plain(*peaks)) == "' Congress' (83 %)"
    assert label(*plain(*[" congress"] * 6, *peaks[:4])) == "' congress' (100 %)"
    # Half is enough; of two halves both are named, the stronger first.
    assert label(*plain(*[" war"] * 5, *[" army"] * 3, *[" peace"] * 2)) == "' war' (50 %)"
    assert label(*plain(*[" war"] * 5, *[" army"] * 5)) == "' war', ' army' (100 %)"


def test_a_phrase_that_half_of_all_samples_share():
    phrase = [([filler, " United", " States"], " Congress", [filler]) for filler in FILLER[-6:]]
    alone = plain(*[" Congress"] * 4)
    assert label(*phrase, *alone) == "' Congress' (100 %) in ' United States Congress' (60 %)"
    assert label(*phrase[:4], *alone, *plain(" war", " army")) == "' Congress' (80 %)"  # 4 of 10 share it
    longer = [([" the", " the", " of"], " war", [" of", " the", " the", " the"]) for _ in range(10)]
    assert label(*longer) == "' war' (100 %) in ' the the of war of' (100 %)"  # at most five tokens
    cut = [([FILLER[i]], " war", [" of", BOS, " the"]) for i in range(10)]
    assert label(*cut) == "' war' (100 %) in ' war of' (100 %)"  # special tokens end it
    left, right = (
        [([" of"], " war", [filler]) for filler in FILLER[:5]],
        [([f], " war", [" the"]) for f in FILLER[:5]],
    )
    assert label(*left, *right) == "' war' (100 %) in ' of war' (50 %)"  # no sample has all of ' of war the'
    # The phrase needs its tokens exactly, but whichever spelling stands at the peak.
    mixed = [([" United"], peak, []) for peak in [" Congress"] * 4 + [" congress"] * 3] + plain(*[" Congress"] * 3)
    assert label(*mixed) == "' Congress' (100 %) in ' United Congress' (70 %)"


def test_few_tokens():
    four = [" he"] * 4
    assert label(*plain(*four, *[" she"] * 3, *[" they"] * 2, " war")) == "' he', ' she' (70 %)"
    some = plain(*four, *[" she"] * 2, " they", " war", " of", " the")
    assert label(*some) == "' he', ' she', ' they' (70 %)"
    others = [" they", " war", " of", " the", ".", " army"]
    assert label(*plain(*four, *others)) == "no single token; most often ' he' (40 %)"
    assert label(*plain(*[" he"] * 3, *[" she"] * 2, *others)) == "no single token; most often ' he' (27 %)"
    assert label(*plain(*[" he"] * 2, *[" she"] * 2, *others)) == "no single token"  # 2 are no pattern
    # What is named is not told again as a context word.
    beside = [([*before, " he", " war"], peak, after) for before, peak, after in plain(*[" he"] * 3, *others)]
    assert label(*beside) == "no single token; most often ' he' (3 of 9); after ' war' (9 of 9)"
    beside = [
        ([*before, " he", filler], peak, after) for (before, peak, after), filler in zip(beside, FILLER, strict=False)
    ]
    assert label(*beside) == "no single token; most often ' he' (3 of 9); near ' war'"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (NUMBERS, "numbers"),
        (MARKS, "punctuation"),
        (TOWNS, "capitalised words"),
        (BREAKS, "line breaks"),
        (SPACES, "white space"),
    ],
)
def test_classes_of_tokens(tokens, expected):
    tokens = (tokens * 3)[:16]
    assert label(*plain(*tokens, " he", " she", " they", " war")) == f"{expected} (80 %)"
    assert label(*plain(*tokens[:15], " he", " she", " they", " war", " army")) == "no single token"


def test_parts_of_words_stand_behind_a_letter():
    before = [" Con", " war", " they", " peace", " army", " navy", " he", " she"]
    inside = [([before[i]], piece, []) for i, piece in enumerate(PIECES)]
    assert label(*inside) == "parts of words (8 of 8)"
    outside = [([(MARKS + BREAKS + SPACES)[3 * i]], piece, []) for i, piece in enumerate(PIECES)]
    assert label(*outside) == "no single token"
    assert label(*inside[:6], *outside[6:]) == "no single token"  # 6 of 8


def test_what_stands_before_and_after():
    towns = (TOWNS * 2)[:10]
    after = [([" President"], town, [FILLER[i]]) for i, town in enumerate(towns)]
    assert label(*after) == "capitalised words (100 %); after ' President' (100 %)"
    both = [([" Congress" if i % 2 else " congress"], towns[i], [" of" if i < 6 else FILLER[i]]) for i in range(10)]
    assert label(*both) == "capitalised words (100 %); after ' congress' (100 %); before ' of' (60 %)"
    assert (
        label(*both[4:], *plain(*[" war"] * 4)) == "no single token; most often ' war' (40 %); after ' congress' (60 %)"
    )
    few = [([FILLER[i]], (" he", " she")[i % 2], [" of"]) for i in range(10)]
    assert label(*few) == "' he', ' she' (100 %); before ' of' (100 %)"


def test_context_words_that_are_commoner_than_chance():
    """Beside towns stand ` navy` and ` the`, not three times as often as their counts predict, ` peace` in too few of
    the samples, a point, which is no word, and ` war`, and in fewer of them ` army`."""
    total = sum(COUNTS.get(text, 1) for text in VOCABULARY)
    held = {" army": 8, " war": 9, " peace": 2, " navy": 9, " the": 20, ".": 9}
    around = [[word for word, n in held.items() if (i * 7) % 20 < n] for i in range(20)]
    samples = [
        ([*words, FILLER[i]], town, [FILLER[i + 20]])
        for i, (town, words) in enumerate(zip((TOWNS * 3)[:20], around, strict=True))
    ]
    tokens = np.mean([len(before) + len(after) for before, _, after in samples])
    lift = {w: n / 20 / (1 - (1 - COUNTS[w] / total) ** tokens) for w, n in held.items()}
    assert 1 < lift[" the"] < lift[" navy"] < 3 < lift[" war"] < lift[" army"] < lift["."]
    assert 9 * np.log(lift[" war"]) < 8 * np.log(lift[" army"])  # the rarer word says more
    assert label(*samples) == "capitalised words (100 %); near ' army', ' war'"
    third = [([" peace", *before], peak, after) for before, peak, after in samples[1:2]]
    assert label(*third, samples[0], *samples[2:]) == "capitalised words (100 %); near ' army', ' war', ' peace'"
    more = [([], town, []) for town in (TOWNS * 3)[:20]]  # 3 of 40 are less than a tenth
    assert label(*third, samples[0], *samples[2:], *more) == "capitalised words (100 %); near ' army', ' war'"


def test_few_samples_are_counted_and_none_have_no_label():
    few = plain(" war", " war", " army")
    assert label(*few) == "' war' (2 of 3)"
    assert label(*few[:1]) == "' war' (1 of 1)"  # one sample makes no phrase
    assert labels([], few, [])[::2] == [None, None]
    together = [([" President"], town, []) for town in TOWNS]
    assert label(*together) == "capitalised words (8 of 8); after ' President' (8 of 8)"
    assert label(*together[:2], *plain(*TOWNS[2:4])) == "' Texas', ' Paris', ' Rome' (3 of 4)"  # 2 are no pattern


def test_the_order_of_windows_and_merges_does_not_matter():
    rng = np.random.default_rng(0)
    features = [
        [(rng.choice(VOCABULARY[1:], 4), rng.choice(VOCABULARY[1:9]), rng.choice(VOCABULARY[1:], 3)) for _ in range(30)]
        for _ in range(20)
    ]
    first = labels(*features)
    assert len(set(first)) > 10
    assert labels(*features, parts=3) == first == labels(*features, parts=4, order=-1)


def test_labels_are_one_harmless_line_of_limited_length():
    assert label(*plain(*["x" * 50] * 3)) == f"'{'x' * 23}…' (3 of 3)"
    assert label(*plain(*["\u202e'"] * 3)) == """"\\u202e'" (3 of 3)"""
    assert label(*plain(*["\u202e'", "<script>|`", "\n"])) == """"\\u202e'", '<script>|`', '\\n' (3 of 3)"""
    wide = [(["x" * 50] * 2, "x" * 50, ["x" * 50] * 2) for _ in range(3)]
    assert label(*wide) == f"'{'x' * 23}…' (3 of 3) in '{'x' * 59}…' (3 of 3)"


@pytest.mark.parametrize("make_tokenizer", [gpt2, llama2, wordpiece])
def test_any_tokenizer(make_tokenizer):
    """The text around the peaks is of real tokens: byte-level BPE, SentencePiece with bytes, WordPiece."""
    tokenizer = make_tokenizer()
    texts = TokenTexts(tokenizer)
    counts = np.ones(len(tokenizer), np.int64)

    def of(*pairs):
        """The label of a feature that peaks on the last token of each first text, which the second follows."""
        samples = []
        for before, after in pairs:
            ids = encode_text(before, tokenizer).ids.tolist()
            samples.append((ids[:-1], ids[-1], encode_text(before + after, tokenizer).ids[len(ids) :].tolist()))
        return machine_labels(make([samples], tokenizer=tokenizer), counts, 1)[0]

    the = texts.token(encode_text("in order to form the", tokenizer).ids[-1])
    assert the == " the"
    found = of(*[(f"{word} the", " order") for word in ("form", "union", "cat", "order", "it", "people")])
    assert found.startswith("' the' (6 of 6) in ' the")
    cafe = of(*[(f"{word} café", " played") for word in ("form", "the", "union")])
    assert cafe.startswith(
        {gpt2: "' café' (3 of 3) in", llama2: "'é' (3 of 3) in ' café"}.get(make_tokenizer, "' cafe' (3")
    )
    emoji = [(f"{word} 🙂", " the") for word in ("form", "union", "cat", "order")]
    if make_tokenizer is not wordpiece:  # which has no token for it
        assert of(*emoji).startswith("'<0x82>' (4 of 4) in ' 🙂")
