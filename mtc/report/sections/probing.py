"""Section 8: what linear probes can read from the features, and absorption on first letters; both on demand."""

from __future__ import annotations

from mtc.report.blocks import Block, Code, FeatureLink, Heading, Paragraph, Section, Table, Text
from mtc.report.sections.features import listed
from mtc.results import (
    NOT_MEASURED,
    Analysis,
    Interval,
    PrefixAbsorption,
    ProbeResult,
    Probing,
    Spelling,
    TaskResult,
    number,
    percent,
)


def probing(analysis: Analysis) -> Section:
    """Section 8: sparse probes beside the dense baseline, by task; spelling and absorption."""
    return Section(
        "Probing", (*_probes(analysis.probing, analysis.facts.trained_tokens > 0), *_spelling(analysis.spelling))
    )


def _probes(found: Probing | None, known: bool) -> list[Block]:
    title = Heading("Sparse probing")
    if found is None:
        return [title, Paragraph((f"Sparse probing was {NOT_MEASURED}: set ", Code("analysis.probe_tasks"), "."))]
    blocks: list[Block] = [
        title,
        Paragraph(
            f"How well a label of a text can be read from a few features ({found.pooling} over the tokens of a window "
            f"of at most {number(found.context_length)}), as area under the ROC curve on texts that "
            + (
                "neither the probe nor the transcoder was trained on"
                if known
                else "the probe was not trained on; what the transcoder was trained on is not known"
            )
            + f", with 95 % intervals over groups of texts. The baseline reads all activations at {found.source}."
        ),
    ]
    for result in found.tasks:
        blocks += _task(result)
    return blocks


def _task(result: TaskResult) -> list[Block]:
    title = Heading(result.task.name)
    if result.not_measured is not None or result.dense is None:
        return [title, Paragraph(f"{NOT_MEASURED.capitalize()}: {result.not_measured}.")]
    about = (
        f"{number(result.used_texts)} of {number(result.texts)} texts, {number(result.trained_texts)} left out because "
        f"the transcoder was trained on them; probes were fitted to {number(result.train_examples)} windows and judged "
        f"on {number(result.test_examples)} of {number(result.test_groups)} groups, where the majority class has "
        f"{percent(result.majority_accuracy)}."
    )
    rows = [_row("All source activations", result.dense)]
    rows += [_row("Source dimensions", probe) for probe in result.dense_sparse]
    rows += [_row(f"Features, prefix {number(probe.prefix)}", probe) for probe in result.sparse]
    headers = ("Probe of", "k", "AUC", "AUC less the baseline's", "Accuracy", "Dimensions or features")
    return [title, Paragraph(about), Table(f"Probes of {result.task.name}", headers, tuple(rows))]


def _row(name: str, probe: ProbeResult) -> tuple[Text, ...]:
    chosen: Text = "all"
    if probe.dimensions:
        shown = probe.dimensions[:4]
        chosen = listed([(FeatureLink(j) if probe.prefix else str(j),) for j in shown])
        if len(shown) < len(probe.dimensions):
            chosen = (*chosen, ", …")
    k = "all" if probe.k is None else number(probe.k)
    beyond = NOT_MEASURED if name == "All source activations" else _interval(probe.beyond_dense)
    return (name, k, _interval(probe.auc), beyond, percent(probe.accuracy), chosen)


def _interval(value: Interval | None) -> str:
    return NOT_MEASURED if value is None else f"{number(value.value)} ({number(value.low)} to {number(value.high)})"


def _spelling(found: Spelling | None) -> list[Block]:
    title = Heading("Absorption on first letters")
    if found is None:
        return [
            title,
            Paragraph((f"Absorption on first letters was {NOT_MEASURED}: set ", Code("analysis.spelling"), ".")),
        ]
    blocks: list[Block] = [title]
    if found.accuracy is not None and found.chance is not None:
        blocks.append(
            Paragraph(
                f"The language model names the first letter of {percent(found.accuracy.value)} of "
                f"{number(found.asked)} words ({percent(found.accuracy.low)} to {percent(found.accuracy.high)}); the "
                f"most frequent letter would be right for {percent(found.chance)}, and "
                f"{percent(found.min_accuracy)} count as spelling."
            )
        )
    if found.not_measured is not None:
        blocks.append(Paragraph(f"Absorption: {NOT_MEASURED}, because {found.not_measured}."))
    if found.prefixes:
        headers = ("Prefix", "Letters with a feature", "Fully absorbed", "Absorption fraction")
        rows = tuple(_prefix(prefix) for prefix in found.prefixes)
        blocks.append(Table("Absorption by prefix", headers, rows))
    return blocks


def _prefix(found: PrefixAbsorption) -> tuple[Text, ...]:
    of = f"{number(found.with_feature)} of {number(len(found.letters))}"
    return (number(found.prefix), of, _interval(found.full_rate), _interval(found.fraction))
