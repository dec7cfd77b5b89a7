"""Gemma Scope's layout, `params.npz`: W_enc [d, F], W_dec [F, d], b_enc, b_dec and threshold [F], all float32.

Read as JumpReLU(x W_enc + b_enc) W_dec + b_dec. Lieberum et al. 2024, arXiv:2408.05147. The format has no place for a
skip connection, and none for a norm: like Gemma Scope's own transcoders, an `rms` one reads the normalised stream.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtc.export.card import model_card
from mtc.export.subject import ExportError, Subject, describe_norm, find_hooks, plain_weights


def write_gemma_scope(subject: Subject, directory: Path) -> None:
    """Write `params.npz`. Raises ExportError for a skip connection or where there is no hook point to read from."""
    weights = plain_weights(subject)
    if weights.W_skip is not None:
        raise ExportError(
            "transcoder.skip=true: gemma-scope-npz has no place for a skip connection; use saelens or circuit-tracer"
        )
    rms = subject.input_norm == "rms"
    hook_name, hook_name_out = find_hooks(subject, normalised=rms).full(subject.layer)
    np.savez(
        directory / "params.npz",
        W_enc=np.ascontiguousarray(weights.W_enc.T.numpy()),
        W_dec=weights.W_dec.numpy(),
        b_enc=weights.b_enc.numpy(),
        b_dec=weights.b_dec.numpy(),
        threshold=weights.threshold.numpy(),
    )
    use = f"""import numpy as np

p = np.load("params.npz")
z = x @ p["W_enc"] + p["b_enc"]  # x at {hook_name}: [tokens, {weights.W_enc.shape[1]}]
features = np.where(z > p["threshold"], z, 0)
y = features @ p["W_dec"] + p["b_dec"]  # imitates {hook_name_out}"""
    card = model_card(subject, "Gemma Scope npz", hook_name, hook_name_out, use, describe_norm(subject, normalised=rms))
    (directory / "README.md").write_text(card)
