"""SAELens 6: `cfg.json` and `sae_weights.safetensors` of a JumpReLUTranscoder or JumpReLUSkipTranscoder.

SAELens computes ReLU(x W_enc + b_enc), masked where the pre-activation is at most the threshold, times W_dec, plus
b_dec. With `normalize_activations: constant_norm_rescale` it divides x by its root mean square for the encoder and,
unlike for autoencoders, does not scale a transcoder's output back. A skip connection always reads x itself; so an `rms`
transcoder with a skip is written for the hook that holds the normalised stream, any other one for the raw source.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save as save_safetensors

from mtc.export.card import model_card
from mtc.export.subject import Subject, describe_norm, find_hooks, plain_weights

FORMAT_OF = "6.54.12"
"""Version of SAELens whose files are written; it converts older versions' configurations when it loads them."""


def write_saelens(subject: Subject, directory: Path) -> None:
    """Write the folder that `sae_lens.SAE.load_from_disk` and `SAE.from_pretrained` read.

    Raises ExportError where the language model has no hook point for what the transcoder reads.
    """
    weights = plain_weights(subject)
    rms, skip = subject.input_norm == "rms", weights.W_skip is not None
    hooks = find_hooks(subject, normalised=rms and skip)
    hook_name, hook_name_out = hooks.full(subject.layer)
    tensors = {
        "W_enc": weights.W_enc.T.contiguous(),
        "b_enc": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
        "threshold": weights.threshold,
    } | ({} if weights.W_skip is None else {"W_skip": weights.W_skip})
    (directory / "sae_weights.safetensors").write_bytes(save_safetensors(tensors))
    config = subject.config
    cfg = {
        "architecture": "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder",
        "d_in": weights.W_enc.shape[1],
        "d_sae": subject.prefix,
        "d_out": weights.W_dec.shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "constant_norm_rescale" if rms and not skip else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_OF,
            "sae_lens_training_version": None,
            "model_name": config.model.name,
            "hook_name": hook_name,
            "hook_name_out": hook_name_out,
            "hf_hook_name": hooks.source_module,
            "hf_hook_name_out": hooks.target_module,
            "dataset_path": None if subject.imported else config.data.name,
            "context_size": config.data.context_length,
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "mtc": {
                "run_id": subject.run_id,
                "group_sizes": list(subject.group_sizes),
                "k": min(config.transcoder.k, subject.prefix),
                "input_norm": subject.input_norm,
                "source": config.model.source,
            },
        },
    }
    (directory / "cfg.json").write_text(json.dumps(cfg, indent=1))
    use = f"""from sae_lens import SAE

transcoder = SAE.load_from_disk(DIRECTORY)  # or huggingface_hub.snapshot_download("OWNER/NAME")
features = transcoder.encode(x)  # x at {hook_name}: [tokens, {weights.W_enc.shape[1]}] -> [tokens, {subject.prefix}]
y = transcoder(x)  # imitates {hook_name_out}"""
    norm = describe_norm(subject, normalised=rms and skip, divides_itself=rms and not skip)
    card = model_card(subject, "SAELens", hook_name, hook_name_out, use, norm, library="saelens", tags=("saelens",))
    (directory / "README.md").write_text(card)
