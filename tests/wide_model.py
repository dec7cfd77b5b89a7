"""A random model of few operations and many activations: each site of a token is WIDTH numbers."""

from pathlib import Path

from transformers import AutoConfig

from mtc.language_model.weights import _make_random

WIDTH = 256


def make_wide_model(directory: Path) -> str:
    """Write it, with the byte tokenizer; its path."""
    directory.mkdir()
    shape = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 259, "max_position_embeddings": 256}
    shape |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    _make_random(AutoConfig.for_model("llama", **shape), directory)
    return str(directory)
