"""The report as Markdown: one function per section, each reading only the Analysis (and examples, for contexts)."""

from __future__ import annotations

from mtc.report import report_names
from mtc.report.format import NOT_MEASURED, context, escape, number, numbers, percent, table, token
from mtc.report.schema import Analysis, Distribution, RunFacts, ShownFeature
from mtc.timing import StreamTiming

EVENTS = 50
"""Rows of the table of events; the JSON report has all of them."""


def render_markdown(analysis: Analysis) -> str:
    model = analysis.config.model
    _, _, overview, scatter = report_names(model.layer)
    parts = [
        f"# Matryoshka transcoder, {escape(model.name)}, layer {model.layer}",
        f"Run {escape(analysis.facts.run_id)}. Numbers have four significant digits; the JSON file has all of them.",
        _summary(analysis),
        f"![Overview of the run]({overview})",
        _configuration(analysis),
        _skipped(analysis.facts),
        *_events(analysis.facts),
        timing_section(analysis.facts.timing),
        _weights(analysis),
        _top_features(analysis),
        f"![Strongest activation against number of samples]({scatter})",
        _features(analysis),
        _insights(analysis),
        _recommendations(analysis),
        _files(analysis),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(analysis: Analysis) -> str:
    s, dead_after = analysis.summary, analysis.config.transcoder.dead_after_tokens
    figures = [
        ("Total features", number(s.total_features)),
        ("Silent features (did not fire on the analysed held-out tokens)", number(s.silent_features)),
        ("Silent fraction", percent(s.silent_fraction)),
        (f"Dead features (training counter: silent for {number(dead_after)} tokens or more)", number(s.dead_features)),
        ("Dead fraction", percent(s.dead_fraction)),
        ("Features with samples", number(s.features_with_samples)),
        ("Total samples", number(s.total_samples)),
        ("Average samples per feature (of those with samples)", number(s.average_samples)),
        ("Uniformly drawn examples", number(s.uniform_examples)),
        ("Trained tokens", number(s.trained_tokens)),
        ("Dropped tokens (activations not finite)", number(analysis.facts.dropped_tokens)),
        ("Analysed held-out tokens (examples, counts)", number(s.analysed_tokens)),
        ("Evaluated held-out tokens (FVU, L0)", number(s.evaluated_tokens)),
        ("Explained variance, full dictionary", percent(s.explained_variance[-1])),
        ("L0, active features per token", number(s.l0)),
        ("k, asked for", number(s.k)),
        ("Tokens for loss recovered", number(s.loss.tokens) if s.loss else NOT_MEASURED),
    ]
    if s.loss:
        figures += [
            ("Cross-entropy, clean (nats per token)", number(s.loss.ce_clean)),
            ("Cross-entropy, MLP output set to zero", number(s.loss.ce_zero)),
            ("Cross-entropy, MLP output set to its mean", number(s.loss.ce_mean)),
        ]
    prefixes = []
    for i, prefix in enumerate(s.prefixes):
        row = [number(prefix), number(s.fvu[i]), number(s.explained_variance[i]), number(analysis.evaluation.l0[i])]
        loss = s.loss
        if loss:
            row += [percent(loss.recovered_zero[i]), percent(loss.recovered_mean[i])]
            row += [number(loss.kl[i]), number(loss.ce_spliced[i])]
        else:
            row += [NOT_MEASURED] * 4
        prefixes.append(row)
    headers = ["Prefix (features)", "FVU", "Explained variance", "L0", "Loss recovered (zero ablation)"]
    headers += ["Loss recovered (mean ablation)", "KL (nats)", "Cross-entropy, spliced"]
    return "\n\n".join(
        [
            "## 1. Executive summary",
            "A sample is a stored top example of a feature, at most one per window. FVU is the fraction of held-out "
            "variance left unexplained.",
            table(["Figure", "Value"], figures),
            "Held out, per nested prefix of the dictionary:",
            table(headers, prefixes),
        ]
    )


def _configuration(analysis: Analysis) -> str:
    c, t, f = analysis.config, analysis.training, analysis.facts
    o, d = c.optimizer, c.data
    schedule = (
        f"linear warm-up over {number(o.warmup_steps)} steps, "
        f"linear over the last {number(o.decay_fraction)} of the steps to {number(o.final_lr_fraction)} of the peak"
    )
    rows = [
        ("Language model", escape(c.model.name)),
        ("Layer", number(c.model.layer)),
        ("Layers trained from the same passes", numbers(f.other_layers) if f.other_layers else "none"),
        (
            "Sites",
            f"{escape(c.model.source)} ({number(t.d_source)}) to {escape(c.model.target)} ({number(t.d_target)})",
        ),
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
        ("Trained tokens", number(f.trained_tokens)),
        ("Batch (tokens)", number(o.batch_tokens)),
        ("Data", escape(f.data_name)),
        ("Documents", _counts(f.documents)),
        ("Windows", _counts(f.windows)),
        ("Context length (tokens)", number(d.context_length)),
        ("Held-out fraction", number(d.heldout_fraction)),
        ("Language model dtype", escape(f.language_model_dtype)),
        ("Transcoder precision", escape(f.precision)),
        ("Train step", escape(f.compute)),
        ("Devices", escape(", ".join(f.devices))),
        ("Trainers", number(f.num_trainers)),
        ("Language model processes", number(f.num_model_actors)),
        *((f"Seconds, {escape(stage)}", number(seconds)) for stage, seconds in f.seconds.items()),
        *((f"Version of {escape(name)}", escape(version)) for name, version in f.versions.items()),
        ("Configuration fingerprint", t.fingerprint),
    ]
    return f"## 2. Training configuration\n\n{table(['Setting', 'Value'], rows)}"


def _skipped(facts: RunFacts) -> str:
    title = "### Skipped input"
    if not facts.skipped_documents:
        return f"{title}\n\nnone"
    rows = [[escape(reason), number(n)] for reason, n in facts.skipped_documents.items()]
    first = "\n".join(f"- {escape(example)}" for example in facts.skipped_examples)
    return "\n\n".join([title, table(["Reason", "Documents"], rows), "The first of them:", first])


def _events(facts: RunFacts) -> list[str]:
    """The section's parts; none if nothing happened."""
    rows = [
        [
            escape(str(event["time"])),
            number(event["step"]) if event.get("step") is not None else "–",
            escape(f"{event['kind']}: {event['message']}"),
        ]
        for event in facts.events[:EVENTS]
    ]
    if not rows:
        return []
    more = len(facts.events) - len(rows)
    return [
        "### What happened during the run",
        table(["Time", "Step", "Event"], rows),
        *([f"And {number(more)} more, which are in the JSON file."] if more else []),
    ]


def timing_section(timing: StreamTiming | None) -> str:
    """What waited on what, as tables."""
    title = "### What waited on what"
    if timing is None:
        return f"{title}\n\nThe time of training was {NOT_MEASURED}."
    t = timing
    parts = {
        "waiting": "waiting for activations",
        "transport": "transport: into the shuffle buffer, and batches out of it",
        "step": "train step",
        "all_reduce": "all-reduce: ranks waiting for each other",
        "checkpoint": "checkpoints",
        "other": "other",
    }
    trainer_rows = [
        [text, number(t.trainer_seconds[part]), percent(t.trainer_seconds[part] / t.wall_seconds)]
        for part, text in parts.items()
    ]
    actor_rows = [
        [text, number(seconds), percent(seconds / t.actor_seconds) if t.actor_seconds else NOT_MEASURED]
        for text, seconds in (
            ("model forward", t.forward_seconds),
            ("sending: into shared memory, or held back there", t.sending_seconds),
            ("idle: waiting for the trainers or the scheduler", t.idle_seconds),
        )
    ]
    rates = [
        ["Tokens per second, end to end", number(t.tokens_per_second)],
        ["Wall time (s), from the first activations to the last batch", number(t.wall_seconds)],
        ["Start-up before that (s)", number(t.startup_seconds)],
        ["Tokens, trained and for calibration", number(t.tokens)],
        ["MFU of the forward passes while they ran", percent(t.forward_mfu)],
        ["MFU over the model actors' time", percent(t.mfu)],
        ["Matrix product rate measured on a model actor (GFLOP/s)", number(t.device_flops / 1e9)],
    ]
    return "\n\n".join(
        [
            title,
            "Since the run's last start. A trainer's parts exclude each other and add up to the wall time; model "
            "actors worked beside them. MFU: operations of the language model's matrix products per second, over "
            "the rate of a large one measured on the same device.",
            table(["Rate", "Value"], rates),
            table([f"Trainers (mean of {number(t.trainers)})", "Seconds", "Share"], trainer_rows),
            table(["Model actors (sum)", "Seconds", "Share of their time"], actor_rows),
        ]
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number(n)} {escape(split)}" for split, n in counts.items()) or NOT_MEASURED


def _weights(analysis: Analysis) -> str:
    w = analysis.weights

    def row(name: str, d: Distribution) -> list[str]:
        return [name, number(d.mean), number(d.std), number(d.min), number(d.max)]

    distributions = [
        row(r"W\_enc", w.encoder), row(r"W\_dec", w.decoder),
        row("Encoder row norms", w.encoder_norm), row("Decoder row norms", w.decoder_norm),
    ]  # fmt: skip
    groups = [
        [
            number(g.group), f"{number(g.first)} to {number(g.end - 1)}", number(g.decoder_norm),
            number(g.silent_features), number(g.mean_density),
        ]
        for g in w.groups
    ]  # fmt: skip
    return "\n\n".join(
        [
            "## 3. Model weight analysis",
            table(["Weights", "Mean", "Std", "Min", "Max"], distributions),
            table(["Group", "Features", "Mean decoder norm", "Silent features", "Mean density"], groups),
        ]
    )


def _top_features(analysis: Analysis) -> str:
    rows = [
        [
            number(f.rank), str(f.feature), number(f.group), number(f.max_activation), number(f.samples),
            token(f.top_token) if f.top_token is not None else "no samples",
        ]
        for f in analysis.top_features
    ]  # fmt: skip
    body = table(["Rank", "Feature", "Group", "Max activation", "Samples", "Top token"], rows)
    return f"## 4. Top features by activation\n\n{body if rows else _none_fired(analysis)}"


def _features(analysis: Analysis) -> str:
    parts = [
        "## 5. Feature analysis",
        "The features of section 4; the JSON file has all. Density is the share of the analysed held-out tokens on "
        "which a feature fires. Tokens are counted over the peaks of its samples; `␣` is a space, `⏎` a line break.",
    ]
    shown = analysis.features
    parts += [_feature(f) for f in shown]
    if not shown:
        parts.append(_none_fired(analysis))
    return "\n\n".join(parts)


def _feature(shown: ShownFeature) -> str:
    f = shown.figures
    figures = [
        number(f.max_activation), number(f.mean_activation), number(f.count), number(f.density), number(f.samples)
    ]  # fmt: skip
    parts = [
        f"### Feature {f.feature} (group {f.group})",
        table(["Max activation", "Mean activation", "Count", "Density", "Samples"], [figures]),
        "Top tokens: " + (", ".join(f"{token(t.token)} ×{number(t.count)}" for t in f.top_tokens) or "no samples"),
    ]
    lines = [
        f"{i}. {context(e.tokens, e.peak)} ({number(e.activation)}, document {escape(e.document_id)})"
        for i, e in enumerate(shown.examples, 1)
    ]
    return "\n\n".join(parts + (["\n".join(lines)] if lines else []))


def _none_fired(analysis: Analysis) -> str:
    s = analysis.summary
    return f"None of the {number(s.total_features)} features fired on {number(s.analysed_tokens)} held-out tokens."


def _insights(analysis: Analysis) -> str:
    lines = [
        f"- {i.text} Rule *{i.rule}*: {escape(i.condition)}; measured {number(i.value)}, "
        f"threshold {number(i.threshold)}: {'met' if i.met else 'not met'}."
        for i in analysis.insights
    ]
    return "## 6. Key insights\n\n" + "\n".join(lines)


def _recommendations(analysis: Analysis) -> str:
    lines = [
        f"- {r.text} Rule *{r.rule}*: {escape(r.condition)}; measured {number(r.value)}."
        for r in analysis.recommendations
    ]
    nothing = f"None of the {number(len(analysis.insights))} rules that could be measured is met."
    return "## 7. Recommendations\n\n" + ("\n".join(lines) or nothing)


def _files(analysis: Analysis) -> str:
    rows = [[escape(f.name), escape(f.description)] for f in analysis.files]
    return f"## 8. Files generated\n\n{table(['File', 'Content'], rows)}"
