"""Small tokenizers of the kinds that models come with, trained here on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "We the people of the United States, in order to form a more perfect union, were playing with the naïve cat.",
    "The cats played in the café; the people were walking, talking and singing: it's the king's thing, isn't it?",
    "def form(order):\n    return [the for the in order if the]\n\n\nThe end of the thing.",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE; text comes back as it was. One added token is spelled as no text in its alphabet is."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    # As larger vocabularies have: the first two bytes of an emoji behind a space are one token.
    state = json.loads(backend.to_str())
    for left, right in (("ð", "Ł"), ("Ġ", "ðŁ")):
        state["model"]["merges"].append([left, right])
        state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([AddedToken("ça va", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def llama2() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with bytes for unknown characters: a space is put before every text."""
    backend = _sentencepiece_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def llama2_new() -> PreTrainedTokenizerFast:
    """The same as newer conversions write it: no normalizer, a space only before the first piece of a text."""
    tokenizer = llama2()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """No space before the text; runs of spaces and the turns of a chat are added tokens that the vocabulary has too."""
    backend = _sentencepiece_bpe()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    backend.add_special_tokens([AddedToken("<start▁of▁turn>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, as in T5: Metaspace puts a space before the text and splits it at spaces."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: lower case, no spaces kept."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make for make in (gpt2, llama2, llama2_new, gemma, unigram, wordpiece)
}


def named(name: Callable[[int], str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is called `name(i)`, which is its text too."""
    backend = Tokenizer(models.WordLevel({name(i): i for i in range(size)}, unk_token=name(0)))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _sentencepiece_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, *BYTES, "▁▁"], show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    state: dict[str, Any] = json.loads(backend.to_str())
    # Bytes are ordinary tokens of the vocabulary; the trainer can only reserve special ones.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    state["model"]["merges"].append(["▁", "▁"])
    state["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(state))
