"""The model card of an export: Markdown below the YAML metadata that model hubs read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mtc.config import RunConfig
from mtc.export.front_matter import Measured, front_matter
from mtc.export.subject import Subject

JUMPRELU = "JumpReLU: a pre-activation counts where it is above its feature's threshold"
TOPK = "TopK: of each token the largest positive pre-activations count"
PAPERS = """@article{bussmann2025matryoshka,
  title = {Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author = {Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  journal = {arXiv:2503.17547},
  year = {2025}
}
@article{dunefsky2024transcoders,
  title = {Transcoders Find Interpretable LLM Feature Circuits},
  author = {Dunefsky, Jacob and Chlenski, Philippe and Nanda, Neel},
  journal = {arXiv:2406.11944},
  year = {2024}
}"""


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
    measured = Measured(config, subject.analysis, subject.prefix, imported=subject.imported)
    ours = {
        "run": subject.run_id,
        "format": format,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "group_sizes": list(subject.group_sizes),
        "k": min(config.transcoder.k, subject.prefix),
    }
    front = front_matter(subject.run_id, [measured], ours, subject.license, library, tags)
    whole = subject.prefix == transcoder.num_features
    size = f"{subject.prefix:,} features" if whole else f"the first {subject.prefix:,} of {transcoder.num_features:,}"
    facts = [
        ("Language model", language_model(config)),
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
    return f"""{front}
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

{quality(measured)}

{closing(config, subject.contact)}"""


def closing(config: RunConfig, contact: str | None, own: str = "") -> str:
    """The last sections of a card: what to cite, `own` BibTeX first, whom to ask, and the language model's notice."""
    text = f"## Citation\n\n```bibtex\n{own}{PAPERS}\n```\n"
    text += f"\n## Contact\n\n{contact}\n" if contact else ""
    return text + (f"\n{config.model.notice}\n" if config.model.notice else "")


def language_model(config: RunConfig) -> str:
    """The language model's name and revision, in Markdown."""
    return f"`{config.model.name}`" + (f", revision `{config.model.revision}`" if config.model.revision else "")


def read_card(path: Path) -> dict[str, Any]:
    """What a card that we wrote says of the transcoder beside it, named as in SAELens's metadata; empty for others'."""
    ours = read_ours(path.read_text(errors="replace")) if path.is_file() else {}
    return ours | {"mtc": ours} if ours else {}


def read_ours(card: str) -> dict[str, Any]:
    """Our own part of a card's metadata; empty for a card that we did not write."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:  # not ours
        front = None
    ours = front.get("mtc") if isinstance(front, dict) else None
    return ours if isinstance(ours, dict) else {}


def quality(measured: Measured) -> str:
    """The held-out figures of every nested dictionary up to the prefix, as a table and sentences."""
    if measured.analysis is None:
        return "Not measured: this run was never analysed."
    summary, evaluation = measured.analysis.summary, measured.analysis.evaluation
    massive, of_all = evaluation.massive, evaluation.all_tokens
    names = ["Fraction of variance unexplained (FVU)", "Active features per token"]
    columns = [evaluation.fvu, evaluation.l0]
    if massive.tokens:
        names, columns = [*names, *(f"{n}, all tokens" for n in names)], [*columns, of_all.fvu, of_all.l0]
    lines = [f"| Features | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for m, *values in zip(evaluation.prefixes, *columns, strict=True):
        shown = (f"{v:.2f}" if i % 2 else f"{v:.4f}" for i, v in enumerate(values))
        lines += [f"| {m:,} | {' | '.join(shown)} |"] if m <= measured.prefix else []
    text = "\n".join(lines)
    if massive.tokens:
        text += (
            f"\n\nWhere it is not said, without {massive.tokens:,} massive tokens, whose target norms are above "
            f"{massive.ratio:g} times the median and which hold {massive.variance:.1%} of the variance."
        )
    text += f"\n\nOn {evaluation.tokens:,} held-out tokens of `{measured.config.data.name}`"
    text += f", after training on {summary.trained_tokens:,} tokens." if summary.trained_tokens else "."
    if summary.loss is not None and summary.loss.share_of_zero(-1) is not None:
        recovered = summary.loss.recovered_zero[evaluation.prefixes.index(measured.prefix)]
        text += (
            f" With the transcoder in the MLP's place the language model recovers {recovered:.1%} of the loss "
            "that replacing the MLP's output by zero costs."
        )
    if evaluation.line is not None:
        text += f" The least-squares affine map from the same source has an FVU of {evaluation.line.fvu:.4f} there."
    return text
