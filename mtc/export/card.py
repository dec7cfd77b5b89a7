"""The model card of an export: Markdown below the YAML metadata that model hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mtc.export.subject import Subject
from mtc.storage import is_hub_id

JUMPRELU = "JumpReLU: a pre-activation counts where it is above its feature's threshold"
TOPK = "TopK: of each token the largest positive pre-activations count"


def model_card(
    subject: Subject,
    format: str,
    hook_name: str,
    hook_name_out: str,
    use: str,
    norm: str,
    library: str | None = None,
    tags: tuple[str, ...] = (),
) -> str:
    """The card's text. `use` is Python that loads and applies the files, `norm` says what they read."""
    config, transcoder = subject.config, subject.transcoder
    metadata: dict[str, Any] = {
        "license": subject.license,
        "library_name": library,
        "base_model": config.model.name if _on_hub(config.model.name) else None,
        "datasets": [config.data.name] if _on_hub(config.data.name) and not subject.imported else None,
        "tags": ["transcoder", "matryoshka", "sparse-autoencoder", "interpretability", "mtc", *tags],
        "mtc": {
            "hook_name": hook_name,
            "hook_name_out": hook_name_out,
            "group_sizes": list(subject.group_sizes),
            "k": min(config.transcoder.k, subject.prefix),
        },
    }
    front = yaml.safe_dump({name: value for name, value in metadata.items() if value}, sort_keys=False)
    whole = subject.prefix == transcoder.num_features
    size = f"{subject.prefix:,} features" if whole else f"the first {subject.prefix:,} of {transcoder.num_features:,}"
    facts = [
        (
            "Language model",
            f"`{config.model.name}`" + (f", revision `{config.model.revision}`" * bool(config.model.revision)),
        ),
        ("Layer", subject.layer),
        ("Reads", f"`{hook_name}`"),
        ("Imitates", f"`{hook_name_out}`"),
        ("Dictionary", f"{size}, in nested groups {list(subject.group_sizes)}"),
        ("Active features", f"about {config.transcoder.k} per token"),
        ("Activation function", JUMPRELU if transcoder.activation.thresholds != "none" else TOPK),
        ("Skip connection", "an affine map of the source is added" if transcoder.W_skip is not None else "none"),
        ("Run", f"`{subject.run_id}`" + ", of weights that were imported, not trained in it" * subject.imported),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    notice = f"\n{config.model.notice}\n" if config.model.notice else ""
    return f"""---
{front}---

# Transcoder of layer {subject.layer} of {config.model.name}

A sparse network of one hidden layer that imitates the MLP of one layer, so that its hidden units, the features, can be
read. Written by mtc in the format of {format}.

| | |
| --- | --- |
{table}

## Use

```python
{use}
```

{norm}

A pre-activation that lies within rounding of its threshold can fall on either side of it. mtc leaves special tokens,
such as the first one of a text (BOS), out of training and of all figures.

## Held-out quality

{_quality(subject)}
{notice}"""


def read_card(path: Path) -> dict[str, Any]:
    """What a card that we wrote says of the transcoder beside it, named as in SAELens's metadata; empty for others'."""
    match = re.match(r"---\n(.*?)\n---\n", path.read_text(errors="replace"), re.DOTALL) if path.is_file() else None
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:  # not ours
        front = None
    ours = front.get("mtc") if isinstance(front, dict) else None
    return ours | {"mtc": ours} if isinstance(ours, dict) else {}


def _on_hub(name: str) -> bool:
    """Whether a model's or data set's name is one on a hub, OWNER/NAME, and not a path, a URL or a package."""
    return "/" in name and is_hub_id(name)


def _quality(subject: Subject) -> str:
    if subject.analysis is None:
        return "Not measured: this run was never analysed."
    summary, evaluation = subject.analysis.summary, subject.analysis.evaluation
    massive, of_all = evaluation.massive, evaluation.all_tokens
    names = ["Fraction of variance unexplained (FVU)", "Active features per token"]
    columns = [evaluation.fvu, evaluation.l0]
    if massive.tokens:
        names, columns = [*names, *(f"{n}, all tokens" for n in names)], [*columns, of_all.fvu, of_all.l0]
    lines = [f"| Features | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for m, *values in zip(evaluation.prefixes, *columns, strict=True):
        shown = (f"{v:.2f}" if i % 2 else f"{v:.4f}" for i, v in enumerate(values))
        lines += [f"| {m:,} | {' | '.join(shown)} |"] if m <= subject.prefix else []
    text = "\n".join(lines)
    if massive.tokens:
        text += (
            f"\n\nWhere it is not said, without {massive.tokens:,} massive tokens, whose target norms are above "
            f"{massive.ratio:g} times the median and which hold {massive.variance:.1%} of the variance."
        )
    text += f"\n\nOn {evaluation.tokens:,} held-out tokens of `{subject.config.data.name}`"
    text += f", after training on {summary.trained_tokens:,} tokens." if summary.trained_tokens else "."
    if summary.loss is not None and summary.loss.share_of_zero(-1) is not None:
        recovered = summary.loss.recovered_zero[evaluation.prefixes.index(subject.prefix)]
        text += (
            f" With the transcoder in the MLP's place the language model recovers {recovered:.1%} of the loss "
            "that replacing the MLP's output by zero costs."
        )
    if evaluation.line is not None:
        text += f" The least-squares affine map from the same source has an FVU of {evaluation.line.fvu:.4f} there."
    return text
