"""The options of a job: a preset or a file, one option for every field of the configuration, and what is shown."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from pydantic import create_model
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from mtc.config import (
    ConfigError,
    RunConfig,
    load_preset,
    make_config,
    merge_settings,
    parse_settings,
    preset_names,
    read_settings,
    suggestion,
)
from mtc.errors import known_cause, one_line
from mtc.programs import described
from mtc.telemetry import FORMAT_VARIABLE, Format, configure, fail

logger = logging.getLogger(__name__)


def parse_command_line(
    argv: Sequence[str],
    description: str,
    known: dict[str, Any] | None = None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[RunConfig, argparse.Namespace]:
    """Read `--preset`, `--config`, `--print-config` and one option per field.

    `known` are nested values that the preset or the file cannot change but an option can; `more` adds options of the
    program's own. Returns the validated configuration and the parsed arguments. Raises ConfigError; exits for `--help`.
    """
    parser = make_parser(description, "(--preset NAME | --config FILE) [--PART.FIELD VALUE ...]")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", metavar="NAME", help=f"one of: {', '.join(preset_names())}")
    start.add_argument("--config", metavar="FILE", help="a YAML file with the same fields as a preset")
    if more:
        more(parser)
    parser.add_argument("--print-config", action="store_true", help="show the resulting configuration and exit")
    arguments, overrides = parse_overrides(parser, argv, tuple(RunConfig.model_fields))
    overrides = merge_settings(known or {}, overrides)
    if arguments.preset:
        return load_preset(arguments.preset, overrides), arguments
    base = read_settings(arguments.config, f"--config {arguments.config}") if arguments.config else {}
    return make_config(base, overrides), arguments


def make_parser(description: str, usage: str) -> argparse.ArgumentParser:
    """A parser with the options that all jobs have, for `parse_overrides`; its description is shown as it stands."""
    parser = argparse.ArgumentParser(
        description=described(description),
        usage=f"%(prog)s {usage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument("--help-fields", action="store_true", help="show every field's option, and exit")
    add_options(parser)
    return parser


def parse_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str], parts: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the options of a parser of `make_parser` and one option per field of some parts of RunConfig.

    Returns the parsed arguments, and what was given of the fields as nested values, not validated. Exits for `--help`.
    From here on logs are as the options say.
    """
    configure()  # what is wrong with the environment is said first
    if {"-h", "--help"} & set(argv):
        parser.epilog = _overview(parts)
        parser.print_help()
        parser.exit()
    fields: dict[str, Any] = {
        name: (RunConfig.model_fields[name].annotation, RunConfig.model_fields[name]) for name in parts
    }
    settings = create_model("Settings", __base__=BaseSettings, **fields)
    source: CliSettingsSource[Any] = CliSettingsSource(settings, root_parser=parser)
    if "--help-fields" in argv:
        parser.print_help()
        parser.exit()
    arguments, unknown = parser.parse_known_args(list(argv))
    if unknown:
        names = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
        meant = suggestion(unknown[0].partition("=")[0].removeprefix("--"), names)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    configure(arguments.verbose, arguments.log_format)
    sweeps = vars(arguments).pop("sweep", None)
    try:
        overrides: dict[str, Any] = source(parsed_args=arguments)()
        return arguments, overrides if sweeps is None else overrides | {"sweep": _sweep(sweeps)}
    except SettingsError as error:
        wrong = re.search(r"for (?:field )?\"?([\w.]+)", str(error))
        name = wrong[1] if wrong else ""
        value = getattr(arguments, name, "")
        value = ", ".join(value) if isinstance(value, list) else value
        raise ConfigError(f'--{name} {value}: JSON is wanted, such as [1, 2] or {{"k": 8}}') from None


def _sweep(given: Sequence[str]) -> Any:
    """What one or more `--sweep` hold, JSON or YAML as in a file: of several, all their entries."""
    values = []
    for text in given:
        try:
            values.append(json.loads(text))
        except json.JSONDecodeError:
            values.append(parse_settings(f"sweep: {text}".encode(), f"--sweep {text}")["sweep"])
    if len(values) == 1:
        return values[0]
    return [entry for value in values for entry in (value if isinstance(value, list) else [value])]


def failed(error: Exception) -> int:
    """Exit code of a job that `error` ended; says why as the last line on standard error.

    What is no MtcError may be a fault of this package: its traceback comes first.
    """
    if known := known_cause(error):
        fail(known.event, f"{known.event.replace('_', ' ')}: {known}")
        return known.exit_code
    logger.error("a job ends", exc_info=error)
    fail("failed", f"failed: {one_line(error)}")
    return 1


def run_program(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> None:
    """Run a program's `main` and end the process with its exit code, also where other threads still wait for Ray.

    Ray makes 1 of every exit code of a submitted job but 0: there its last line says which it was.
    """
    try:
        code = main(argv)
    except SystemExit as end:  # argparse's
        code = int(end.code or 0)
    if code and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        fail("ended", f"ends with exit code {code}")
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a thread may still wait for Ray Train, and would abort the process in the middle of its end


def _overview(parts: Sequence[str]) -> str:
    lines = [f"fields of the configuration, each with an option of its own such as --{_example(parts[0])}:"]
    for part in parts:
        field = RunConfig.model_fields[part]
        if isinstance(field.annotation, type):
            first = (field.annotation.__doc__ or "").strip().splitlines()[0]
            lines.append(f"  --{part + '.*':<15} {first}")
        else:  # a field of its own
            lines.append(f"  --{part:<15} {(field.description or '').partition(':')[0]}.")
    return "\n".join([*lines, "", "--help-fields explains them all, --print-config shows their values."])


def _example(part: str) -> str:
    """The part's first number."""
    fields = RunConfig.model_fields[part].annotation.model_fields  # type: ignore[union-attr]
    return next(f"{part}.{name} N" for name, field in fields.items() if field.annotation is int)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--verbose` and `--log-format`."""
    parser.add_argument("--verbose", action="store_true", help="also show what Ray, its workers and the libraries say")
    parser.add_argument(
        "--log-format",
        choices=get_args(Format),
        default=None,
        help=f"lines for people or one JSON object a line (default: ${FORMAT_VARIABLE}, or text)",
    )
