"""Tokenizers of every kind that models come with: the ids that all parts of the product read, and the texts they show.

The truth is transformers itself, the tokenizer on the whole text, and the text that was given.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig

from mtc.analysis.examples import ExampleCollector
from mtc.analysis.token_sums import SparseActivations
from mtc.config import ModelConfig, load_preset
from mtc.language_model import load_tokenizer, pack_windows
from mtc.probing.spelling import MIDDLE, _ids
from mtc.text import TokenTexts, encode_text, make_windows, store_fingerprint
from mtc.text import tokens as module
from serve.service import Tokeniser
from tests.strangers.tokenizers_as_they_come import KINDS, TEXT, gemma, gpt2, llama2, llama2_new, unigram, wordpiece

SENTENCES = [
    "We the people were playing in the café, weren't we?",
    "  the cat\n\n\tThe naïve 😀 cats 😀😀!  ",
    "日本語 the people\n",
    "the ça va <s> </s> <|endoftext|> people",
    "\n",
    "T",
]
LOSSLESS = ("gpt2", "llama2", "llama2_new", "gemma")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, truncation=False, padding=False)
    return list(ids["input_ids"])


def fingerprint_of(tokenizer: Any, directory: Path, **data: Any) -> str:
    return store_fingerprint(load_preset("tiny", {"data": {"name": str(directory / "*.txt")} | data}), tokenizer)[0]


def save(tokenizer: Any, directory: Path) -> ModelConfig:
    """A model's directory, without weights."""
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    return ModelConfig(name=str(directory), layer=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
def test_a_tokenizer_that_was_saved_after_a_padded_call_reads_whole_texts(kind: str, tmp_path: Path) -> None:
    text = " ".join(SENTENCES) * 3
    tokenizer = KINDS[kind]()
    clean = plain_ids(tokenizer, text)
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "a.txt").write_text("a text")
    fingerprint = fingerprint_of(tokenizer, tmp_path)
    tokenizer(["Hi", text], padding=True, truncation=True, max_length=17)
    config = save(tokenizer, tmp_path / "model")
    served = Tokeniser(config)
    answer = served.text(text)
    assert (answer.ids.tolist(), answer.truncated) == ([tokenizer.bos_token_id, *clean], False)
    assert served.text("Hi").ids.tolist() == [tokenizer.bos_token_id, *plain_ids(tokenizer, "Hi")]
    for loaded in (load_tokenizer(config), AutoTokenizer.from_pretrained(config.name)):
        (window,) = make_windows(text, loaded, 1 << 20)
        assert window == answer.ids.tolist()
        assert plain_ids(loaded, text) == clean
        # Another caller of a shared tokenizer may set what it likes between two texts.
        loaded(["Hi", text], padding=True, truncation=True, max_length=17)
        assert encode_text(text, loaded).ids.tolist() == clean
        assert encode_text("Hi", loaded).ids.tolist() == plain_ids(loaded, "Hi")
        # Its ids are the clean one's, and so are its stores.
        loaded(["Hi", text], padding=True, truncation=True, max_length=17)
        assert fingerprint_of(loaded, tmp_path) == fingerprint


def test_threads_that_share_a_tokenizer_read_what_one_reads(tmp_path: Path) -> None:
    tokenizer = llama2()
    tokenizer.pad_token = "</s>"
    tokenizer(["Hi", TEXT[0]], padding=True, truncation=True, max_length=5)
    served = Tokeniser(save(tokenizer, tmp_path))
    texts = [sentence * 20 for sentence in SENTENCES]
    expected = [[1, *plain_ids(tokenizer, text)] for text in texts]
    wrong: list[object] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        try:
            barrier.wait()
            for _ in range(10):
                answers = [served.text(text) for text in texts]
                found = [answer.ids.tolist() for answer in answers]
                strings = ["".join(served.strings(answer)[1:]) for answer in answers]
                if found != expected or strings != texts:
                    wrong.append((found, strings))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_have_the_ids_and_offsets_of_the_whole(
    kind: str, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_CHARS", 4000)
    monkeypatch.setattr(module, "OVERLAP", 1024)
    tokenizer = tokenizers[kind]
    rng = np.random.default_rng(0)
    words = [word for text in TEXT for word in text.split()] + ["😀", "日本語", "naïve", "the" * 40]
    marks = [" ", " ", " ", "\n", "\n\n", "  ", "\t", ", ", ""]
    chosen = zip(rng.choice(words, 2000), rng.choice(marks, 2000), strict=True)
    longer = "".join(word + mark for word, mark in chosen)
    texts = {
        "of words": longer,
        "without a space": longer.replace(" ", "").replace("\n", ""),
        "in lines": longer.replace(" ", "\n"),
        "of one letter": "t" * 11_000,
        "of spaces": " " * 11_000,
        "with a long run inside": longer[:3900] + "e" * 9001 + longer[:5000],
        "one character more than a part": longer[:4001],
    }
    if kind == "wordpiece":  # BERT takes a long word for one unknown token: that is where parts can't be joined
        del texts["without a space"], texts["of one letter"], texts["with a long run inside"]
    backend = tokenizer.backend_tokenizer
    for name, text in texts.items():
        found = encode_text(text, tokenizer)
        whole = backend.encode(text, add_special_tokens=False)
        assert found.ids.tolist() == whole.ids, name
        assert [tuple(pair) for pair in found.offsets.tolist()] == whole.offsets, name


def test_parts_that_share_no_token_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_CHARS", 4000)
    monkeypatch.setattr(module, "OVERLAP", 1024)
    tokenizer = wordpiece()
    text = "the " + "e" * 15_000 + " people " + " " * 9000 + "of the union"
    names = tokenizer.convert_ids_to_tokens(encode_text(text, tokenizer).ids.tolist())
    assert [name for name in names if name != "[UNK]"] == tokenizer.tokenize("the people of the union")
    assert "".join(TokenTexts(gpt2()).sequence(encode_text(text, gpt2()).ids.tolist())) == text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_a_sequence_joined_are_the_text(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    texts = TokenTexts(tokenizer)
    for sentence in [*SENTENCES, *TEXT]:
        found = encode_text(sentence, tokenizer)
        ids = found.ids.tolist()
        pieces = texts.sequence(ids, starts_text=True)
        joined = "".join(pieces)
        # A space at the beginning is taken for the one that is put there.
        if kind in LOSSLESS and not (kind == "llama2_new" and sentence[0] == " "):
            assert joined == sentence
            # The first offsets of Llama-2 have a character for the space that is put before it.
            for i, piece, (first, end) in list(zip(ids, pieces, found.offsets.tolist(), strict=True))[1:]:
                assert sentence[first:end] == piece or texts.is_part(i)
        if "<unk>" not in joined and "[UNK]" not in joined and "ça va" not in joined:
            assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        # Within a text, the first token is as it is anywhere else.
        assert texts.sequence(ids)[1:] == pieces[1:]
    # Ids in an order that no text gives; of SentencePiece's bytes only whole characters are alike in both.
    rng = np.random.default_rng(0)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    plain = [i for i, name in enumerate(names) if name[:3] != "<0x" and i not in tokenizer.added_tokens_decoder]
    for ids in rng.choice(plain, (200, 30)).tolist():
        joined = "".join(texts.sequence(ids, starts_text=True))
        assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_token_alone_keeps_its_space_and_shows_its_bytes(tokenizers: dict[str, Any]) -> None:
    def alone(kind: str, *names: str) -> list[str]:
        ids = tokenizers[kind].convert_tokens_to_ids(list(names))
        assert tokenizers[kind].convert_ids_to_tokens(ids) == list(names)
        texts = TokenTexts(tokenizers[kind])
        return [texts.token(i) for i in ids]

    for kind in ("llama2", "llama2_new", "gemma"):
        assert alone(kind, "▁the", "th", "▁", "<0xE2>", "<0x0A>") == [" the", "th", " ", "<0xE2>", "\n"]
        assert alone(kind, "▁▁", "<s>", "</s>", "<unk>", "é") == ["  ", "<s>", "</s>", "<unk>", "é"]
    assert alone("gemma", "<start▁of▁turn>") == ["<start▁of▁turn>"]
    assert alone("gpt2", "Ġthe", "the", "Ġ", "Ċ", "<|endoftext|>", "ça va") == [
        " the", "the", " ", "\n", "<|endoftext|>", "ça va",
    ]  # fmt: skip
    assert alone("gpt2", "ĠðŁ", "ðŁ", "Ã", "©") == [" <0xF0><0x9F>", "<0xF0><0x9F>", "<0xC3>", "<0xA9>"]
    assert alone("unigram", "▁the", "</s>") == [" the", "</s>"]
    assert alone("wordpiece", "the", "##ing", "[SEP]", ",") == [" the", "ing", "[SEP]", ","]
    beyond = len(tokenizers["gpt2"])
    assert TokenTexts(tokenizers["gpt2"]).token(beyond) == f"<{beyond}>"


def test_characters_of_several_tokens_stand_at_their_last(tokenizers: dict[str, Any]) -> None:
    for kind, parts in (("gpt2", ["a", "", "", "😀", "!"]), ("llama2", ["a", "", "", "", "😀", "!"])):
        tokenizer = tokenizers[kind]
        texts = TokenTexts(tokenizer)
        tail = [tokenizer.convert_tokens_to_ids(name) for name in (("!",) if kind == "gpt2" else ("<0x21>",))]
        ids = [*encode_text("a😀", tokenizer).ids.tolist(), *tail]
        pieces = texts.sequence(ids, starts_text=True)
        assert pieces == parts
        # What is left of a character that a context cuts is one sign for each piece of it, as Python decodes it.
        assert "".join(texts.sequence(ids[:-2])).strip() == "a\ufffd"
        assert "".join(texts.sequence(ids[-2:])) == "\ufffd!"
    # Words are shown whole again where an unfinished character stands before them.
    tokenizer = tokenizers["gpt2"]
    half, the = tokenizer.convert_tokens_to_ids(["ĠðŁ", "Ġthe"])
    assert TokenTexts(tokenizer).sequence([half, the, half, half]) == [" \ufffd", " the", " ", "\ufffd \ufffd"]


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "gemma"])
def test_contexts_of_examples_read_as_the_text(kind: str, tokenizers: dict[str, Any]) -> None:
    """The peaks of one feature are at all tokens; the contexts around them are pieces of the text."""
    tokenizer = tokenizers[kind]
    text = "the cats played 😀 in the 日本語 café: the people, the union and the 😀😀 naïve kings"
    (window,) = make_windows(text, tokenizer, 1000)
    ids = np.array(window, np.int32)
    bos = int(ids[0])
    count = len(ids) - 1
    collector = ExampleCollector(count, 1, 0, 8, 0.0)
    each = np.arange(count)
    collector.add(np.array([7]), pack_windows([ids], [bos]), SparseActivations(each, each, np.ones(count, np.float32)))
    texts = TokenTexts(tokenizer)
    table = collector.examples(lambda _: [ids], [bos], lambda _: ["a"], texts).table().to_pylist()
    assert len(table) == count
    for row in table:
        at = row["position"]
        first, end = max(1, at - 4), at + 5
        assert row["context_ids"] == ids[first:end].tolist()
        joined = "".join(row["context_tokens"]).strip("\ufffd ")
        assert joined in text
        assert row["context_tokens"] == texts.sequence(ids[first:end].tolist())
        assert row["token"] == texts.token(int(ids[at])) != ""
    # The first token is `▁the` too where a space is put before the text.
    assert [row["token"] for row in table].count(" the") == text.count(" the") + (kind == "llama2")


def test_spelling_reads_the_same_tokens_as_the_text(tokenizers: dict[str, Any]) -> None:
    """A prompt is put together from words and what stands between them, which must be read as within a text."""
    for make in (gpt2, llama2, llama2_new, gemma, unigram):
        tokenizer = make()
        whole = encode_text(f"the{MIDDLE} T\n", tokenizer).ids.tolist()
        parts = [*_ids(tokenizer, MIDDLE), *_ids(tokenizer, " T"), *_ids(tokenizer, "\n")]
        assert parts == whole[-len(parts) :]
