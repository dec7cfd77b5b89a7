"""Let a language model name the features of a finished run, and measure what its labels are worth.

    python jobs/label.py --run runs/latest --endpoint http://127.0.0.1:8000/v1 --model NAME --dry-run
    python jobs/label.py --run runs/latest --endpoint http://127.0.0.1:8000/v1 --model NAME
    python jobs/label.py --run runs/ID --layer 9 --endpoint https://api.example.com/v1 --model NAME --max-tokens 5000000
    ray job submit -- python jobs/label.py --run s3://bucket/runs/ID --engine --engines 4 --model NAME
    python jobs/label.py --run runs/latest --embeddings http://127.0.0.1:8001/v1 --embedding-model NAME

An endpoint is any that is compatible with OpenAI's, such as a vLLM server; its key comes from $OPENAI_API_KEY, or from
the variable that --key-variable names. With --engine vLLM runs the models on the cluster that this job is in, or on
this machine; otherwise no cluster is needed. Writes labels.parquet into the run, and the labels and their scores into
its report; with --embeddings, alone or in the same command, a vector of each feature's label for search by meaning
into embeddings.safetensors. What was answered is kept and never asked again: the same command goes on where one ended.
Exit codes: 0 done, 1 failed while running or stopped by --max-tokens, 2 unusable run, option or endpoint, or another
job writes the run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from jobs import label_models as models
from jobs import label_vectors as vectors
from jobs.command_line import add_options, failed, run_program
from jobs.label_vectors import PROGRESS_SECONDS
from mtc.config import ConfigError
from mtc.errors import MtcError
from mtc.programs import described
from mtc.report import write_report
from mtc.results import Analysis, FeatureLabel, Labelling, number
from mtc.storage import (
    LABELS,
    Lease,
    RunDirectory,
    labels_to_parquet,
    load_analysis,
    open_run,
    publish_whole,
    read_labels,
)
from mtc.telemetry import configure, fail, say, set_run

if TYPE_CHECKING:
    from mtc.labels import Budget, Cost, Progress, RunEvidence, Settings


class Unfinished(MtcError):
    """A limit was reached before all was asked; what was answered is kept and written."""

    exit_code = 1
    event = "unfinished"


def main(argv: list[str] | None = None) -> int:
    try:
        configure()  # what is wrong with the environment is said first
        options = _parser().parse_args(argv)
        configure(options.verbose, options.log_format)
        signal.signal(signal.SIGTERM, _interrupt)
        whole, members = find_runs(options.run, options.layer)
        set_run(whole.run_id)
        check_options(options, members)
        label(options, whole, members)
    except Exception as error:
        return failed(error)
    except KeyboardInterrupt:
        fail("interrupted", "interrupted; what was answered is kept, and the same command goes on")
        return 130
    return 0


def find_runs(url: str, layer: int | None) -> tuple[RunDirectory, Mapping[str, RunDirectory]]:
    """The whole run, and those of its transcoders that are labelled, by name. Raises RunError or ConfigError."""
    run = open_run(url, verify=False)
    if "/" in run.run_id:
        whole = RunDirectory(run.url.rstrip("/").rpartition("/")[0], run.run_id.partition("/")[0])
        found = {run.run_id.rpartition("/")[2]: run}
    else:
        whole, found = run, run.members()
    names = {member.name: member.config.model.layer for member in whole.config().members()}
    if layer is not None:
        found = {name: own for name, own in found.items() if names.get(name) == layer}
        if not found:
            raise ConfigError(f"--layer {layer}: the run has {', '.join(str(n) for n in sorted(set(names.values())))}")
    return whole, found


def check_options(options: argparse.Namespace, members: Mapping[str, RunDirectory]) -> None:
    """Raises ConfigError for options that can't be, RunError for transcoders that were never analysed."""
    models.check_options(options, _parser())
    for name in ("concurrency", "seconds", "attempts", "max_tokens", "engines"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{models.option(name)} {value}: above 0 is wanted")
    for name in ("thinking_tokens", "seed", "engine_gpus"):
        if (value := getattr(options, name)) < 0:
            raise ConfigError(f"{models.option(name)} {value}: 0 or more is wanted")
    for run in members.values():
        prefixes = run.config().members()[0].config.transcoder.prefixes
        if options.prefix is not None and options.prefix not in prefixes:
            raise ConfigError(f"--prefix {options.prefix} is not one of the nested dictionaries {list(prefixes)}")
        load_analysis(run)


def label(options: argparse.Namespace, whole: RunDirectory, members: Mapping[str, RunDirectory]) -> None:
    """Label some of a run's transcoders, one after the other, or ask for vectors of their labels. Raises EndpointError
    where the endpoint refuses, and Unfinished at the limit."""
    # With torch, through the analysis' intervals: 3 s, which a wrong option should not cost.
    from mtc.labels import Budget, RunEvidence, Settings, estimate

    settings = Settings(
        options.seed, options.prefix, None if options.scored == "all" else options.scored, options.simulation
    )
    for run in members.values():
        if options.model:
            cost = estimate(RunEvidence(run, settings.seed), settings, options.thinking_tokens)
            tell_cost(cost, run, options.max_tokens)
        if options.embeddings:
            vectors.tell_cost(options, run)
    if options.dry_run:
        return
    budget, finished = Budget(options.max_tokens, options.thinking_tokens), True
    with Lease(whole) as lease, models.answering(options, whole.config().cluster.room_seconds) as answering:
        for run in members.values():
            if options.model:
                # Not analysis.json, which a job that was killed may have left newer than the manifest; it is written
                # anew.
                run.verify(("features.parquet", "examples.parquet", "contexts.parquet"))
                evidence = RunEvidence(run, settings.seed)
                labelling = label_one(options, run, evidence, settings, budget, answering, lease.require)
                finished &= labelling.finished
                lease.require()
                publish_whole(whole, latest=False)
                tell(labelling, run)
            if options.embeddings:
                found = vectors.embed_labels(options, run, budget, lease.require)
                lease.require()
                publish_whole(whole, latest=False)
                vectors.require_all(found, run)
                finished &= found.finished
    if not finished:
        raise Unfinished(
            f"--max-tokens {options.max_tokens} does not allow for more; a higher one goes on where this one ends"
        )


def label_one(
    options: argparse.Namespace, run: RunDirectory, evidence: RunEvidence, settings: Settings, budget: Budget,
    answering: models.Answering, still_ours: Callable[[], None],
) -> Labelling:  # fmt: skip
    """Label one transcoder's features and write what comes of it; nothing is published."""
    from mtc import labels

    judge_model = options.judge or options.model
    with ExitStack() as stack:
        asked = {}
        for name in dict.fromkeys((options.model, judge_model)):
            journal = stack.enter_context(labels.Journal(run, name))
            asked[name] = (stack.enter_context(answering(name, journal)), journal)
        labeller = labels.Labeller(
            evidence, asked[options.model], asked[judge_model], settings, budget, _progress(still_ours)
        )
        found = labeller.run()
    analysis = load_analysis(run)
    shown = [each.figures.feature for each in analysis.features]
    labelling = labels.summarise(found, shown, (options.model, judge_model), settings, analysis.facts.analysed or "")
    new = {row.feature for row in found.rows}
    rows = sorted([*found.rows, *(row for row in read_labels(run) if row.feature not in new)], key=by_feature)
    names = {row.feature: row.label or row.machine_label for row in rows}
    content = {LABELS: labels_to_parquet(rows)}
    content |= report_of(run, labels.relabel(analysis, names, labelling))
    still_ours()
    for name, data in content.items():
        run.write(name, data)
    return labelling


def by_feature(row: FeatureLabel) -> int:
    return row.feature


def report_of(run: RunDirectory, analysis: Analysis) -> dict[str, bytes]:
    """The files of a changed analysis: itself, and its report."""
    features = pq.read_table(io.BytesIO(run.read("features.parquet")))
    report = write_report(analysis, features, run.read_lines("metrics.jsonl"))
    files = {"analysis.json": analysis.model_dump_json(indent=1).encode()}
    return files | {f"report/{name}": data for name, data in report.items()}


def tell_cost(cost: Cost, run: RunDirectory, limit: int | None) -> None:
    """What all of it costs, by estimate."""
    said = (
        f"{run.url}: {cost.features:,} features to label, labels of {cost.scored:,} to score: about "
        f"{cost.questions:,} questions, {cost.prompt_tokens:,} tokens of prompts and at most "
        f"{cost.most_answer_tokens:,} of answers; what was asked before costs nothing"
    )
    said += f"; --max-tokens {limit:,}" if limit is not None else ""
    say("cost", said, url=run.url, **cost._asdict(), max_tokens=limit)


def tell(labelling: Labelling, run: RunDirectory) -> None:
    """What came out, in a few lines."""
    place = run.location("labels.parquet")
    say(
        "labelled",
        f"wrote {place}: {labelling.labelled:,} of {labelling.features:,} features have a label by {labelling.model}",
        url=place,
        **labelling.model_dump(include={"features", "labelled", "revised", "scored", "requests", "finished"}),
    )
    tokens = labelling.prompt_tokens + labelling.answer_tokens
    said = f"{labelling.requests:,} answers: {labelling.prompt_tokens:,} tokens of prompts and "
    said += f"{labelling.answer_tokens:,} of answers, {round(1000 * tokens / max(1, labelling.features)):,} a thousand"
    say("tokens", f"{said} features", **labelling.model_dump(include={"prompt_tokens", "answer_tokens"}))
    if labelling.failures:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in labelling.failures.items())
        say("failures", f"answers that could not be used: {counts}", failures=labelling.failures)
    if labelling.not_scored:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in labelling.not_scored.items())
        say("not_scored", f"features that could not be scored: {counts}", not_scored=labelling.not_scored)
    for score in labelling.scores:
        about = f"{score.labels} labels, {score.test}: {number(score.mean.value)} ({number(score.mean.low)} to "
        about += f"{number(score.mean.high)}) over {score.features:,} features"
        say("scores", about, **score.model_dump())


def _progress(still_ours: Callable[[], None]) -> Callable[[Progress], None]:
    last = 0.0

    def tell(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < PROGRESS_SECONDS and progress.done < progress.of:
            return
        last = time.monotonic()
        still_ours()
        said = f"{progress.stage}: {progress.done:,} of {progress.of:,} answers, {progress.spent:,} tokens spent"
        say("progress", said, **progress._asdict())

    return tell


def _scored(text: str) -> int | str:
    if text == "all":
        return text
    if not text.replace("_", "").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: a number of features or `all` is wanted")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="directory or URL of a finished run, or ROOT/latest")
    parser.add_argument("--layer", type=int, metavar="N", help="of a run of several layers only this one")
    parser.add_argument("--endpoint", metavar="URL", help="base URL, which ends in /v1 mostly, of the next two")
    parser.add_argument("--model", metavar="NAME", help="the model that names features")
    parser.add_argument("--judge", metavar="NAME", help="the model that judges the labels (default: the same)")
    parser.add_argument("--embeddings", metavar="URL", help="base URL of an endpoint that gives vectors of labels")
    parser.add_argument("--embedding-model", metavar="NAME", help="the model that makes them")
    parser.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable that holds the key"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what it will cost, and ask nothing")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens of prompts and answers together that this job may cost"
    )
    parser.add_argument("--prefix", type=int, metavar="M", help="label only the first M features, a nested dictionary")
    parser.add_argument(
        "--scored", type=_scored, default=500, metavar="N", help="features whose labels are scored, drawn at random; "
        "`all`, or 0 for none (default: 500)",
    )  # fmt: skip
    parser.add_argument("--simulation", action="store_true", help="score by simulation, too, which costs most")
    parser.add_argument("--seed", type=int, default=0, help="by which contexts are drawn (default: 0)")
    parser.add_argument("--concurrency", type=int, default=16, help="questions asked at a time (default: 16)")
    parser.add_argument("--seconds", type=float, default=120, help="deadline of one attempt (default: 120)")
    parser.add_argument("--attempts", type=int, default=6, help="most attempts of one question (default: 6)")
    parser.add_argument("--engine", action="store_true", help="run the models on GPUs of this cluster, by vLLM")
    parser.add_argument("--engines", type=int, default=1, metavar="N", help="copies of a model (default: 1)")
    parser.add_argument("--engine-gpus", type=int, default=1, metavar="N", help="GPUs of each copy (default: 1)")
    parser.add_argument(
        "--engine-set", action="append", default=[], metavar="NAME=VALUE", help="an argument of vllm.LLM; repeatable"
    )
    parser.add_argument(
        "--thinking-tokens", type=int, default=0, metavar="N", help="tokens that the model may spend before each answer"
    )
    add_options(parser)
    return parser


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_program(main)
