"""The YAML metadata of a model card that model hubs read, with the held-out figures as `model-index`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from mtc.config import RunConfig
from mtc.results import Analysis
from mtc.storage import is_hub_id

TAGS = ("transcoder", "matryoshka", "sparse-autoencoder", "interpretability", "mtc")


class Measured(NamedTuple):
    """One transcoder that a card tells of."""

    config: RunConfig
    """Configuration that it was trained with, of one layer."""
    analysis: Analysis | None
    """Analysis on held-out text; None if there is none."""
    prefix: int
    """Features that the card tells of: one of the nested dictionaries, and those inside it."""
    name: str = ""
    """What tells it from the run's other transcoders, such as `layer9`; empty for the only one."""
    imported: bool = False
    """The weights were trained elsewhere, on a text that the configuration does not name."""


def front_matter(
    run_id: str,
    members: Sequence[Measured],
    mtc: dict[str, Any],
    license: str | None = None,
    library: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The metadata of a card with its two lines of dashes; `mtc` is what only we read of it."""
    model, data = members[0].config.model, members[0].config.data
    results = [result for member in members for result in eval_results(member)]
    card = ModelCardData(
        license=license,
        library_name=library,
        base_model=model.name if on_hub(model.name) else None,
        datasets=[data.name] if on_hub(data.name) and not members[0].imported else None,
        tags=[*TAGS, *tags],
        model_name=run_id if results else None,
        eval_results=results or None,
        mtc=mtc,
    )
    return f"---\n{card.to_yaml()}\n---\n"


def eval_results(member: Measured) -> list[EvalResult]:
    """The figures of every nested dictionary up to `member.prefix`; none without an analysis."""
    if member.analysis is None:
        return []
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name="imitating MLP layers",
            dataset_type=data.name if on_hub((data := member.config.data).name) else "text",
            dataset_name=data.name,
            dataset_config=data.subset,
            dataset_split="held-out",
            metric_type=kind,
            metric_name=f"{words}, layer {member.config.model.layer}, {features:,} features",
            metric_value=value,
            metric_args={"layer": member.config.model.layer, "features": features}
            | ({"transcoder": member.name} if member.name else {}),
        )
        for kind, words, features, value in _figures(member.analysis, member.prefix)
    ]


def on_hub(name: str) -> bool:
    """Whether a model's or data set's name is one on a hub, OWNER/NAME, and not a path, a URL or a package."""
    return "/" in name and is_hub_id(name)


def _figures(analysis: Analysis, prefix: int) -> Iterable[tuple[str, str, int, float]]:
    """(id, name, features, value) of each figure."""
    evaluation, summary = analysis.evaluation, analysis.summary
    silent = accumulate(group.silent_features for group in analysis.weights.groups)
    without = " without massive tokens" if evaluation.massive.tokens else ""
    for i, (m, never) in enumerate(zip(evaluation.prefixes, silent, strict=True)):
        if m > prefix:
            return
        yield "fvu", f"FVU{without}", m, evaluation.fvu[i]
        yield "l0", f"L0{without}", m, evaluation.l0[i]
        if evaluation.massive.tokens:
            yield "fvu_all_tokens", "FVU of all tokens", m, evaluation.all_tokens.fvu[i]
            yield "l0_all_tokens", "L0 of all tokens", m, evaluation.all_tokens.l0[i]
        if summary.loss is not None and (recovered := summary.loss.share_of_zero(i)) is not None:
            yield "loss_recovered", "Loss recovered, of zero ablation", m, recovered
        yield "silent_share", f"Features silent on {summary.analysed_tokens:,} tokens", m, never / m
        if m == summary.total_features and summary.dead_fraction is not None:
            yield "dead_share", "Features dead when training ended", m, summary.dead_fraction
