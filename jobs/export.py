"""Share a finished run: in another library's format, or on the Hugging Face hub; or make a run of others' weights.

    python jobs/export.py --run runs/latest --format saelens --output exported/saelens
    python jobs/export.py --run runs/latest --push OWNER/NAME         # the run itself, opened by hf://OWNER/NAME
    python jobs/export.py --run runs/latest --push OWNER/NAME --format saelens   # what --format writes
    python jobs/export.py --import layer_5/width_16k/average_l0_59 --from gemma-scope-npz \\
        --preset gemma-2-2b-layer17 --output.root runs --output.run_id gemma-scope-5

The hub's token comes from HF_TOKEN or `hf auth login`. An import takes the options of jobs/train.py. Formats, and what
is exact in them: docs/export.md. Exit codes: 0 done, 1 failed while running, 2 unusable run, files or configuration.
"""

from __future__ import annotations

import argparse
import posixpath
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from jobs.command_line import failed, parse_command_line, run_program
from mtc.config import ConfigError, to_yaml
from mtc.programs import described
from mtc.storage import (
    RunDirectory,
    check_writable,
    open_run,
    prepare_environment,
    require_one_layer,
    require_run_name,
    with_absolute_paths,
)
from mtc.telemetry import configure

FORMATS = ("saelens", "circuit-tracer", "gemma-scope-npz", "neuronpedia")
IMPORTS = ("saelens", "gemma-scope-npz", "gemma-scope-2")


def main(argv: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        configure()
        prepare_environment()
        if any(a == "--import" or a.startswith("--import=") for a in arguments):
            if run := import_run(arguments):
                print(f"imported {run.url}")
        else:
            export_run(_export_parser().parse_args(arguments))
    except Exception as error:
        return failed(error)
    return 0


def export_run(options: argparse.Namespace) -> None:
    """Write the run in `options.format` to `options.output`, and push that, or the run itself, to `options.push`.

    Raises what `main` turns into exit code 2, or 1 if the hub can't be reached.
    """
    _check(options)
    run = open_run(options.run, verify=bool(options.format))  # staging checks every file itself
    # Torch and transformers take 3 to 7 s; without them, help, a wrong option and a wrong run are told in 1.
    from mtc import export

    if options.output:
        with export.new_directory(options.output) as directory:
            _write(run, directory, options)
        print(f"wrote {options.output} ({options.format}) from {run.url}; its README.md is a model card")
    if not options.push:
        return
    with tempfile.TemporaryDirectory(prefix="mtc-push-") as temporary:
        directory, noted = Path(options.output or temporary), 0
        if not options.format:
            notes = _with_notes(options)
            noted = export.stage_run(run, options.push, directory, options.license, options.contact, notes)
        elif not options.output:
            _write(run, directory, options)
        pushed = export.push_directory(directory, options.push, options.public)
    what = f"{options.format} of {run.url}" if options.format else f"{run.url}, to open as hf://{options.push},"
    seen = "private" if pushed.private else "public"
    also = f", with people's notes and stars on {noted} feature{'s' * (noted != 1)}" if noted else ""
    if options.format in (None, "neuronpedia") and not pushed.private and options.notes is None:
        also = ", without people's notes and stars, which --notes makes public"
    print(f"pushed {what} to {pushed.url} ({seen}){also}: {pushed.files} files in one commit, {pushed.commit}")


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not fit together, ExportError for a push that can't be."""
    if not options.format and not options.push:
        raise ConfigError("--format says what to write to --output; --push alone pushes the run itself")
    if options.format and not options.output and not options.push:
        raise ConfigError("--output DIR says where --format is written, or --push where it is pushed")
    if not options.format:
        given = ("output", "prefix", "model_type", "neuronpedia_model", "neuronpedia_set")
        if wrong := [f"--{name.replace('_', '-')}" for name in given if getattr(options, name)]:
            raise ConfigError(f"{', '.join(wrong)}: without --format the run is pushed as it is")
    if options.public and not options.push:
        raise ConfigError("--public belongs to --push")
    if options.notes is not None and options.format not in (None, "neuronpedia"):
        raise ConfigError(f"--notes and --no-notes: {options.format} has no place for notes")
    if options.push:
        from mtc import export  # as in export_run

        export.check_push(options.push)


def _with_notes(options: argparse.Namespace) -> bool:
    """Whether people's notes go along: where everybody sees them only if that is asked for."""
    return not options.public if options.notes is None else bool(options.notes)


def _write(run: RunDirectory, directory: Path, options: argparse.Namespace) -> None:
    from mtc import export  # as in export_run

    def subject(own: RunDirectory) -> export.Subject:
        return export.load_subject(own, options.prefix, options.model_type, options.license, options.contact)

    if options.format == "circuit-tracer":  # the only one that several layers share
        if run.config().sweep:  # several of one layer
            require_one_layer(run)
        members = list(run.members().values())
        export.write_circuit_tracer([subject(own) for own in members], directory, members)
    elif options.format == "saelens":
        export.write_saelens(subject(run), directory)
    elif options.format == "gemma-scope-npz":
        export.write_gemma_scope(subject(run), directory)
    else:
        names = options.neuronpedia_model, options.neuronpedia_set
        export.write_neuronpedia(subject(run), run, directory, *names, _with_notes(options))


def import_run(arguments: list[str]) -> RunDirectory | None:
    """Make a finished run as the arguments say, or print its configuration; raises what gives exit code 2."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="path", required=True)
    parser.add_argument("--from", dest="format", choices=IMPORTS, required=True)
    options, rest = parser.parse_known_args(arguments)
    from mtc import export  # as in export_run; only `--help` without `--import` does without
    from mtc.language_model import check_model

    readers = (export.read_saelens, export.read_gemma_scope, export.read_gemma_scope_2)
    imported = dict(zip(IMPORTS, readers, strict=True))[options.format](options.path)
    config, parsed = parse_command_line(rest, __doc__ or "", imported.known)
    if parsed.print_config:
        print(to_yaml(config), end="")
        return None
    given, config = config.output.root, with_absolute_paths(config)
    check_writable(f"output.root={given}", config.output.root)
    info = check_model(config.model)
    config = config.of_layers(info.num_layers)
    name = config.model.name.rstrip("/").split("/")[-1].split(":")[-1]
    run_id = config.output.run_id or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-layer{config.model.layer}-imported"
    run = RunDirectory(posixpath.join(config.output.root, run_id))
    require_run_name(run)
    export.write_run(imported, config, info, run)
    return run


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="directory or URL of a finished run, or ROOT/latest")
    parser.add_argument("--format", choices=FORMATS, help="what to write; without it, --push takes the run itself")
    parser.add_argument("--output", metavar="DIR", help="local directory that is made")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hugging Face hub, made if need be")
    parser.add_argument("--public", action="store_true", help="everybody sees the repository; by default it is private")
    parser.add_argument(
        "--notes",
        action=argparse.BooleanOptionalAction,
        help="people's notes and stars go along; not where --public is",
    )
    parser.add_argument(
        "--prefix", type=int, metavar="M", help="one of the nested dictionaries; by default all features"
    )
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for the model card")
    parser.add_argument("--contact", metavar="TEXT", help="whom to ask, for the model card")
    parser.add_argument(
        "--model-type", metavar="NAME", help="the model's architecture (gemma2), where the model is out of reach"
    )
    parser.add_argument("--neuronpedia-model", metavar="ID", help="Neuronpedia's id of the model")
    parser.add_argument("--neuronpedia-set", metavar="ID", help="Neuronpedia's id of the set of dictionaries")
    parser.add_argument("--import", metavar="PATH", help="make a run of these files instead; with --from, no --run")
    parser.add_argument("--from", choices=IMPORTS, help="format of the files to import")
    return parser


if __name__ == "__main__":
    run_program(main)
