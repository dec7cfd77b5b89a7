"""circuit-tracer: `layer_<N>.safetensors` with W_enc [F, d], W_dec [F, d], b_enc, b_dec, W_skip [d, d] and
`activation_function.threshold`, and `config.yaml` that names the hooks in a block; with `features/`, what the viewer
shows of features (mtc.export.feature_files).

The library has no norm of its own, so an `rms` transcoder reads `ln2.hook_normalized`. It builds a replacement model
from a set that covers every layer from 0 on; single layers load with `load_relu_transcoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import save as save_safetensors

from mtc.export.card import model_card
from mtc.export.feature_files import write_feature_files
from mtc.export.subject import ExportError, Subject, describe_norm, find_hooks, plain_weights
from mtc.storage import RunDirectory

FEATURES = """

`features/` holds what circuit-tracer's viewer shows of the features. It looks on the hub for the repository that a
graph's `scan` names: upload this directory and name it. Versions with `--features_dir` read `features/` itself where
`scan` is a path that begins with `/`."""


def write_circuit_tracer(
    subjects: Sequence[Subject], directory: Path, runs: Sequence[RunDirectory] | None = None
) -> None:
    """Write one file per layer and their common configuration; with `runs`, those of the subjects in their order, also
    `features/` of the layers that were analysed.

    Raises ExportError if the layers differ in what a set has in common (hooks, features, skip), or there is no hook.
    """
    first = subjects[0]
    rms = first.input_norm == "rms"
    hooks = find_hooks(first, normalised=rms)
    for subject in subjects:
        same = (subject.input_norm == "rms") == rms and find_hooks(subject, normalised=rms)[:2] == hooks[:2]
        shapes = {(s.prefix, s.transcoder.shape.d_source, s.transcoder.W_skip is None) for s in (first, subject)}
        if not same or len(shapes) > 1:
            raise ExportError(
                f"layers {first.layer} and {subject.layer} differ in source, input norm, size or skip connection; a "
                "circuit-tracer set has one of each, so export them one by one"
            )
        weights = plain_weights(subject)
        tensors = {
            "W_enc": weights.W_enc,
            "W_dec": weights.W_dec,
            "b_enc": weights.b_enc,
            "b_dec": weights.b_dec,
            "activation_function.threshold": weights.threshold,
        } | ({} if weights.W_skip is None else {"W_skip": weights.W_skip})
        (directory / f"layer_{subject.layer}.safetensors").write_bytes(save_safetensors(tensors))
    config = {
        "model_name": first.config.model.name,
        "model_kind": "transcoder_set",
        "feature_input_hook": hooks.source,
        "feature_output_hook": hooks.target,
        "scan": first.run_id,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    layers = sorted(subject.layer for subject in subjects)
    hook_name, hook_name_out = hooks.full(layers[0])
    complete = layers == list(range(len(layers)))
    use = f"""from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

transcoder = load_relu_transcoder("layer_{layers[0]}.safetensors", {layers[0]}, lazy_encoder=False, lazy_decoder=False)
features = transcoder.encode(x)  # x at {hook_name}
y = transcoder.decode(features, x)  # imitates {hook_name_out}"""
    norm = describe_norm(first, normalised=rms)
    if not complete:
        norm += (
            f"\n\nThe files cover layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}. circuit-tracer's "
            "replacement model needs every layer of the language model, from 0 on, in one set."
        )
    if runs is not None:
        write_feature_files(subjects, runs, directory / "features")
    if (directory / "features").exists():
        norm += FEATURES
    card = model_card(first, "circuit-tracer", hook_name, hook_name_out, use, norm, tags=("circuit-tracer",))
    (directory / "README.md").write_text(card)
