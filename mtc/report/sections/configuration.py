"""Section 2: the configuration, what follows from it, and what happened during the run."""

from __future__ import annotations

from typing import Any

from mtc.report.blocks import Block, Code, Heading, Items, Paragraph, Section, Table, Text
from mtc.report.sections.provenance import captured
from mtc.results import NOT_MEASURED, Analysis, RunFacts, StreamTiming, number, percent
from mtc.results.numbers import numbers

EVENTS = 50
"""Most rows of the table of events; the JSON report has all of them."""


def configuration(analysis: Analysis) -> Section:
    """Section 2: settings with what they came to; skipped input; events; timing; every field of the configuration."""
    blocks: list[Block] = [
        _settings(analysis),
        Heading("Skipped input"),
        *_skipped(analysis.facts),
        *_events(analysis.facts),
        *timing_blocks(analysis.facts.timing),
        Heading("All fields of the configuration"),
        _fields(analysis),
    ]
    return Section("Training configuration", tuple(blocks))


def timing_blocks(timing: StreamTiming | None) -> list[Block]:
    """Where the time of training went: what waited on what."""
    title = Heading("What waited on what")
    if timing is None:
        return [title, Paragraph(f"The time of training was {NOT_MEASURED}.")]
    t = timing
    parts = {
        "waiting": "waiting for activations",
        "transport": "transport: into the shuffle buffer, and batches out of it",
        "step": "train step",
        "all_reduce": "all-reduce: ranks waiting for each other",
        "checkpoint": "checkpoints",
        "other": "other",
    }
    trainer_rows = tuple(
        (text, number(t.trainer_seconds[part]), percent(t.trainer_seconds[part] / t.wall_seconds))
        for part, text in parts.items()
    )
    actor_rows = tuple(
        (text, number(seconds), percent(seconds / t.actor_seconds) if t.actor_seconds else NOT_MEASURED)
        for text, seconds in (
            ("model forward", t.forward_seconds),
            ("sending: into shared memory, or held back there", t.sending_seconds),
            ("idle: waiting for the trainers or the scheduler", t.idle_seconds),
        )
    )
    rates = (
        ("Tokens per second, end to end", number(t.tokens_per_second)),
        ("Wall time (s), from the first activations to the last batch", number(t.wall_seconds)),
        ("Start-up before that (s)", number(t.startup_seconds)),
        ("Tokens, trained and for calibration", number(t.tokens)),
        ("MFU of the forward passes while they ran", percent(t.forward_mfu)),
        ("MFU over the model actors' time", percent(t.mfu)),
        ("Matrix product rate measured on a model actor (GFLOP/s)", number(t.device_flops / 1e9)),
    )
    return [
        title,
        Paragraph(
            "Since the run's last start. A trainer's parts exclude each other and add up to the wall time; model "
            "actors worked beside them. MFU: operations of the language model's matrix products per second, over "
            "the rate of a large one measured on the same device."
        ),
        Table("Rates of the stream", ("Rate", "Value"), rates),
        Table("Time of the trainers", (f"Trainers (mean of {number(t.trainers)})", "Seconds", "Share"), trainer_rows),
        Table("Time of the model actors", ("Model actors (sum)", "Seconds", "Share of their time"), actor_rows),
    ]


def setting(value: Any) -> str:
    """The value of a configuration field: exact, so that it can be typed again."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(setting(v) for v in value) if isinstance(value, list | tuple) else str(value)


def _settings(analysis: Analysis) -> Table:
    c, t, f = analysis.config, analysis.training, analysis.facts
    o, d = c.optimizer, c.data
    schedule = (
        f"linear warm-up over {number(o.warmup_steps)} steps, "
        f"linear over the last {number(o.decay_fraction)} of the steps to {number(o.final_lr_fraction)} of the peak"
    )
    sites = f"{c.model.source} ({number(t.d_source)}) to {c.model.target} ({number(t.d_target)})"
    rows: list[tuple[str, str]] = [
        ("Language model", c.model.name),
        ("Layer", number(c.model.layer)),
        ("Layers trained from the same passes", numbers(f.other_layers) if f.other_layers else "none"),
        ("Transcoders trained beside this one", ", ".join(f.other_members) or "none"),
        ("Sites", sites),
        ("Features", number(c.transcoder.num_features)),
        ("Group sizes", numbers(c.transcoder.group_sizes)),
        ("Prefixes", numbers(t.prefixes)),
        ("k", number(c.transcoder.k)),
        ("Input scaling", f"{t.input_norm}, factor {number(t.input_scale)}"),
        ("Target factor", number(t.target_scale)),
        ("Inference threshold", number(t.threshold)),
        ("Calibration tokens", number(f.calibration_tokens)),
        ("Skip connection", "yes" if c.transcoder.skip else "no"),
        ("Prefix weights", numbers(c.transcoder.prefix_weights) if c.transcoder.prefix_weights else "equal"),
        ("AuxK coefficient", number(c.transcoder.aux_coefficient)),
        ("AuxK features per token", number(c.transcoder.aux_k)),
        ("Learning rate", number(c.lr)),
        ("Schedule", schedule),
        ("Adam betas", numbers(o.betas)),
        ("Gradient clip", number(o.gradient_clip)),
        ("Steps", f"{number(f.steps)} of {number(t.planned_steps)}"),
        ("Trained tokens", number(f.trained_tokens) + captured(f)),
        ("Batch (tokens)", number(o.batch_tokens)),
        ("Data", f.data_name),
        ("Documents", _counts(f.documents)),
        ("Windows", _counts(f.windows)),
        ("Context length (tokens)", number(d.context_length)),
        ("Held-out fraction", number(d.heldout_fraction)),
        ("Language model dtype", f.language_model_dtype),
        ("Language model passes", "; ".join(f.language_model_compute) or NOT_MEASURED),
        ("Transcoder precision", f.precision),
        ("Train step", f.compute or NOT_MEASURED),
        ("Devices", ", ".join(f.devices)),
        ("Trainers", number(f.num_trainers)),
        ("Language model processes", number(f.num_model_actors)),
    ]
    return Table("Settings and what they came to", ("Setting", "Value"), tuple(rows))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number(n)} {split}" for split, n in counts.items()) or NOT_MEASURED


def _skipped(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    for title, unit, found, examples in (
        ("Documents that could not be used", "Documents", facts.skipped_documents, facts.skipped_examples),
        ("Entries of data.name that are not read", "Entries", facts.unread_files, facts.unread_examples),
    ):
        if found:
            rows = tuple((reason, number(n)) for reason, n in found.items())
            blocks += [Table(title, ("Reason", unit), rows), Paragraph("The first of them:"), Items(examples)]
    return blocks or [Paragraph("none")]


def _events(facts: RunFacts) -> list[Block]:
    """The table of the run's events; nothing if nothing happened."""
    rows = tuple(
        (
            str(event["time"]),
            number(event["step"]) if event.get("step") is not None else "–",
            f"{event['kind']}: {event['message']}",
        )
        for event in facts.events[:EVENTS]
    )
    if not rows:
        return []
    more = len(facts.events) - len(rows)
    return [
        Heading("What happened during the run"),
        Table("Events", ("Time", "Step", "Event"), rows),
        *([Paragraph(f"And {number(more)} more, which are in the JSON file.")] if more else []),
    ]


def _fields(analysis: Analysis) -> Table:
    """Every field of the configuration under the name that the command line and the recommendations give it."""
    rows: list[tuple[Text, ...]] = []
    for part, values in analysis.config.model_dump(mode="json", exclude={"sweep"}).items():
        rows += [(Code(f"{part}.{name}"), setting(value)) for name, value in values.items()]
    if analysis.facts.trained_tokens and not analysis.evaluation.massive.in_weights:
        field = Code("transcoder.massive_tokens")  # its default, which that training did not know
        rows = [(name, "not known to the run" if name == field else value) for name, value in rows]
    return Table("Configuration", ("Field", "Value"), tuple(rows), folded=True)
