"""Where the figures come from: what it takes to make them again."""

from __future__ import annotations

from mtc.report.blocks import Paragraph, Section, Table
from mtc.results import Headline, RunFacts, number

NOT_KNOWN = "not known"


def provenance(analysis: Headline, of_sweep: bool = False) -> Section:
    """Where the figures come from: configuration, data, code, seeds, tokens, hardware and time.

    `of_sweep`: of the run that `analysis` is one transcoder of, without what the others may have otherwise.
    """
    f, t, c, s = analysis.facts, analysis.training, analysis.config, analysis.summary
    rows = [
        ("Run", _run(f, of_sweep)),
        ("Analysed (UTC)", f.analysed or NOT_KNOWN),
        ("Git revision", f.git_revision or NOT_KNOWN),
        *([] if of_sweep else [("Configuration fingerprint", t.fingerprint)]),
        ("Data", f.data_name),
        ("Data fingerprint", f.data_fingerprint or NOT_KNOWN),
        ("Seeds", f"data {c.data.seed}" + ("" if of_sweep else f", transcoder {c.transcoder.seed}")),
        ("Trained tokens", number(f.trained_tokens) + captured(f)),
        ("Calibration tokens", number(f.calibration_tokens)),
        ("Held-out tokens, evaluated", number(s.evaluated_tokens)),
        ("Held-out tokens, loss", number(s.loss.tokens if s.loss else None)),
        ("Hardware", "; ".join(f.hardware) or NOT_KNOWN),
        ("Devices", ", ".join(f.devices)),
        ("Wall time (s)", number(sum(f.seconds.values())) if f.seconds else number(None)),
        *((f"Wall time, {stage} (s)", number(seconds)) for stage, seconds in f.seconds.items()),
        *((f"Version of {name}", version) for name, version in f.versions.items()),
        ("Report format", number(analysis.format_version)),
    ]
    return Section(
        "Provenance",
        (
            Table("Where the figures come from", ("What", "Value"), tuple(rows)),
            Paragraph(
                "config.yaml in the run directory reproduces the run; "
                + (
                    "each transcoder's own report has its fields."
                    if of_sweep
                    else "the same fields stand in section 2."
                )
            ),
        ),
    )


def captured(facts: RunFacts) -> str:
    """How many tokens were captured for those that were trained, in brackets; empty if that is as many or not known."""
    count = facts.captured_tokens
    return "" if count in (None, facts.trained_tokens) else f" ({number(count)} captured)"


def stamp(analysis: Headline, of_sweep: bool = False) -> str:
    """The run in one line; `of_sweep` as in `provenance`."""
    f = analysis.facts
    parts = [f"run {_run(f, of_sweep)}", *([] if of_sweep else [f"configuration {analysis.training.fingerprint}"])]
    parts += [f"data {f.data_fingerprint or NOT_KNOWN}", f"git {f.git_revision or NOT_KNOWN}"]
    parts += [f"{number(f.trained_tokens)} trained tokens{captured(f)}", f"analysed {f.analysed or NOT_KNOWN}"]
    return ", ".join(parts)


def _run(facts: RunFacts, of_sweep: bool) -> str:
    """Id of the run, or of the one that it is a part of."""
    return facts.run_id.partition("/")[0] if of_sweep else facts.run_id
