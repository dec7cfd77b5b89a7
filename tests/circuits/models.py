"""Tiny random models of three layers in float64, with transcoders of the first and the last."""

from typing import Any

import torch

from mtc.circuits import ReplacementModel
from mtc.config import ModelConfig
from mtc.language_model import LanguageModel, load_tokenizer
from mtc.transcoder import MatryoshkaTranscoder
from mtc.transcoder.shape import TranscoderShape

ARCHITECTURES = ["gemma2", "gemma3", "llama", "gpt2", "gpt_neox"]
PROMPT = "Hello, you!"
GROUPS = (16, 32)


def random_transcoder(width: int, seed: int, **shape: Any) -> MatryoshkaTranscoder:
    """Weights of every kind are there, and most features are active on some token."""
    about: dict[str, Any] = {"group_sizes": GROUPS, "k": 8, "skip": True, "input_norm": "rms"} | shape
    transcoder = MatryoshkaTranscoder(TranscoderShape(d_source=width, d_target=width, **about), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in transcoder.named_parameters():
            if name in ("W_dec", "b_dec", "b_enc", "W_skip"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        transcoder.threshold.fill_(0.2)
        transcoder.target_scale.fill_(3.0)
        transcoder.input_scale.fill_(0.5)
    return transcoder


def make_model(architecture: str, source: str = "resid_mid", **shape: Any) -> ReplacementModel:
    config = ModelConfig(name=f"random:{architecture}", dtype="float32", layer=1)
    model = LanguageModel(config, full=True)
    model.model.double()
    transcoders = {layer: random_transcoder(model.d_model, layer, **shape) for layer in (0, 2)}
    return ReplacementModel(model, transcoders, load_tokenizer(config), sources=dict.fromkeys(transcoders, source))
