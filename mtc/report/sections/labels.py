"""Section 9: labels by a language model, and what they are worth beside those of rules; on demand."""

from __future__ import annotations

from mtc.report.blocks import Block, Code, Heading, Label, Paragraph, Plots, Section, Table, Text
from mtc.results import (
    LABEL_PLOT,
    Analysis,
    FeatureLabel,
    Interval,
    LabelKind,
    Labelling,
    LabelScore,
    number,
    percent,
)

BY: dict[LabelKind, str] = {"model": "the language model", "machine": "rules"}


def labels(analysis: Analysis) -> Section:
    """Section 9: who made the labels, how well a judge does with them, and what they cost."""
    found = analysis.labelling
    if found is None:
        text = (
            "The labels in this report are made by rules, from each feature's strongest examples. A language model's "
            "were not asked for: ",
            Code("python jobs/label.py --help"),
            " tells how.",
        )
        return Section("Labels", (Paragraph(text),))
    blocks: list[Block] = [Paragraph(_who(found)), *_scores(found)]
    if analysis.facts.analysed != found.analysed:
        blocks.append(
            Paragraph(f"The scores are on the examples of an earlier analysis, of {found.analysed}, not on this one's.")
        )
    return Section("Labels", (*blocks, *_curve(found), *_left_out(found)))


def describe_label(row: FeatureLabel) -> list[Text]:
    """One feature's labels with their scores, by who made them."""
    found: list[Text] = []
    for kind, label in (("model", row.label), ("machine", row.machine_label)):
        if label is not None:
            name = row.model if kind == "model" else "rules"
            own = [score for score in row.scores if score.labels == kind]
            found.append((f"Label by {name}: ", Label(label), *([f" ({_row_scores(own)})"] if own else [])))
    if row.label is None:
        found.append(f"{row.model} gave no label: {row.reason or 'it was not asked'}")
    return found


def _row_scores(scores: list[LabelScore]) -> str:
    return ", ".join(f"{score.test} {_interval(score.score)}" for score in scores)


def _who(found: Labelling) -> str:
    text = f"{found.model} labelled {number(found.labelled)} of the {number(found.features)} features with examples"
    text += f", {number(found.revised)} of them a second time, knowing the labels of their children" * bool(
        found.revised
    )
    text += "; the labels in this report are its own, and those of rules where it gave none. "
    if not found.finished:
        text += "The labelling is not finished: a limit on tokens was reached. "
    return text + (
        f"{number(found.requests)} answers took {number(found.prompt_tokens)} tokens of prompts and "
        f"{number(found.answer_tokens)} of answers."
    )


def _scores(found: Labelling) -> list[Block]:
    if not found.scores:
        return [Heading("Scores"), Paragraph("No labels were scored.")]
    rows: list[tuple[Text, ...]] = [
        (
            f"{score.test.capitalize()}, labels of {BY[score.labels]}", _interval(score.mean), number(score.features),
            "–" if score.said_yes is None else percent(score.said_yes),
        )
        for score in sorted(found.scores, key=lambda score: score.test)
    ]  # fmt: skip
    rows += [
        (f"{d.test.capitalize()}, what the language model adds to rules", _interval(d.mean), number(d.features), "–")
        for d in found.differences
    ]
    text = (
        f"How well {found.judge} tells from a label alone in which contexts the feature is active (detection), and in "
        "which the marked tokens are those on which it is (fuzzing): balanced accuracy, 1 if always right, 0.5 by "
        "chance, on contexts that the explainer never saw, half of them active and of all strengths, half silent and "
        "as many near misses among them as there are. Means over features with 95 % intervals. A judge that says yes "
        "to far more or far fewer than half can't tell."
    )
    headers = ("Test", "Score", "Features", "Said yes")
    return [Heading("Scores"), Paragraph(text), Table("Scores of labels", headers, tuple(rows))]


def _curve(found: Labelling) -> list[Block]:
    if not found.yes:
        return []
    description = (
        "How often the judge called a context active, by how strongly the feature is active there, for labels of the "
        "language model and of rules."
    )
    rows = tuple(
        (f"{_part(y.part)}, labels of {BY[y.labels]}", _interval(y.share, percent), number(y.contexts))
        for y in found.yes
    )
    headers = ("Contexts", "Called active", "Number")
    return [Plots(((LABEL_PLOT, description),)), Table("Contexts that the judge called active", headers, rows, True)]


def _left_out(found: Labelling) -> list[Block]:
    rows = [(f"Answer: {reason}", number(count)) for reason, count in found.failures.items()]
    rows += [(f"Feature not scored: {reason}", number(count)) for reason, count in found.not_scored.items()]
    if not rows:
        return []
    return [Heading("What could not be used"), Table("Left out, by reason", ("Reason", "Count"), tuple(rows))]


def _part(part: str) -> str:
    return f"Fifth {part} of the activations" if part.isdigit() else f"Silent, {part}"


def _interval(value: Interval, form: object = number) -> str:
    write = percent if form is percent else number
    return f"{write(value.value)} ({write(value.low)} to {write(value.high)})"
