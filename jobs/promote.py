"""Give a finished run a name, such as `production`, that only this moves; take it back; or show who had it.

    python jobs/promote.py runs/smollm2-2 --to production --gate gate.yaml --by "A. Name"
    python jobs/promote.py --rollback --to production --root runs
    python jobs/promote.py --list --root runs                           # with --to NAME, its history

`ROOT/production` then works wherever `ROOT/latest` does, and a service of that name follows. The run's files are
checked against its manifest. A gate is a YAML file of limits, to which every layer is held:

    fvu: {max: 0.35, max_increase: 0.01}              # relative ones count from what is promoted now
    loss_recovered: {min: 0.9, max_decrease: 0.02}
    dead: {max: 0.1}                                  # share of the features
    l0_error: {max: 0.1}                              # |mean L0 - k| / k

The alias remembers its gate, and holds the next run to it where none is given. Exit codes: 0 done, 1 failed while
running, 2 unusable run, name or gate, 3 the run is not within the gate; nothing has moved but with 0.
"""

from __future__ import annotations

import argparse

from pydantic import ValidationError

from jobs.command_line import add_options, failed, run_program
from mtc.config import ConfigError, describe_faults, read_settings
from mtc.programs import described
from mtc.results import Check, Gate
from mtc.storage import (
    GateError,
    absolute,
    last_known,
    open_run,
    promote,
    read_aliases,
    require_alias_name,
    roll_back,
)
from mtc.telemetry import configure

ROOT = "runs"


def main(argv: list[str] | None = None) -> int:
    try:
        configure()
        options = _parser().parse_args(argv)
        configure(options.verbose, options.log_format)
        _check(options)
        if options.list:
            show(options)
        elif options.rollback:
            take_back(options)
        else:
            move(options)
    except Exception as error:
        return failed(error)
    return 0


def move(options: argparse.Namespace) -> None:
    """Promote a run; raises what `main` turns into exit codes."""
    gate = read_gate(options.gate) if options.gate else None
    if "://" in options.run:  # before gigabytes come from a place where no alias can be
        require_alias_name(options.run.rpartition("/")[0], options.to)
    run = open_run(options.run)
    try:
        done = promote(run, options.to, gate, options.no_gate, options.by, options.note, options.dry_run)
    except GateError as error:
        print(table(error.checks))
        raise
    if done.checks:
        print(table(done.checks))
    if not done.alias.gate:
        print("no gate: give one with --gate, and the alias keeps it")
    before = f"before {done.previous}" if done.previous else "the first"
    print(f"{options.to} {'would be' if options.dry_run else 'is'} {done.alias.run_id}, {before}")


def take_back(options: argparse.Namespace) -> None:
    """Roll an alias back; raises what `main` turns into exit codes."""
    done = roll_back(absolute(options.root or ROOT), options.to, options.by, options.note, options.dry_run)
    for run_id, reason in done.passed_over.items():
        print(f"passed over {run_id}: {reason}")
    print(f"{options.to} {'would be' if options.dry_run else 'is'} {done.alias.run_id} again, before {done.previous}")


def show(options: argparse.Namespace) -> None:
    """Print all aliases, or the history of one."""
    root = absolute(options.root or ROOT)
    if options.to:
        alias = last_known(root, options.to)
        if alias is None:
            raise ConfigError(f"--to {options.to}: {root} has no such alias")
        rows = [(each.when, each.what, each.run_id, each.by or "", each.note or "") for each in alias.history]
        print(_columns([("when", "what", "run", "by", "note"), *rows]))
        if alias.gate:
            print(f"gate {alias.gate.model_dump_json(exclude_defaults=True)}")
        return
    found = read_aliases(root)
    names = [(name, each.run_id, each.history[-1].when if each.history else "") for name, each in found.items()]
    print(_columns([("alias", "run", "since"), *names]) if names else f"no alias in {root}")


def read_gate(path: str) -> Gate:
    """A gate from a YAML file; raises ConfigError that names the field, the limit and the value."""
    name = f"--gate {path}"
    try:
        return Gate.model_validate(read_settings(path, name))
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe_faults(error, Gate)}") from None


def table(checks: list[Check]) -> str:
    """Every limit, what was measured, and what is promoted now."""
    rows = [
        (check.layer, check.figure, _number(check.value), _number(check.now), check.limit, check.problem or "holds")
        for check in checks
    ]
    return _columns([("layer", "figure", "value", "now", "limit", ""), *rows])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not fit together."""
    if (options.run is not None) + options.rollback + options.list != 1:
        raise ConfigError("name a RUN to promote, or --rollback, or --list: one of them")
    if not options.to and not options.list:
        raise ConfigError("--to NAME says which alias moves")
    if options.root and options.run is not None:
        raise ConfigError("--root belongs to --rollback and --list: an alias lies beside its run")
    if options.gate and options.no_gate:
        raise ConfigError("--gate and --no-gate: one of them")
    if options.run is None and (options.gate or options.no_gate):
        raise ConfigError("--gate and --no-gate belong to a RUN that is promoted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="a finished run, ROOT/latest, or one layer of several")
    parser.add_argument("--to", metavar="NAME", help="the alias")
    parser.add_argument("--gate", metavar="FILE", help="limits in YAML, which the alias remembers")
    parser.add_argument("--no-gate", action="store_true", help="hold the run to nothing, and forget the alias's gate")
    parser.add_argument("--by", metavar="WHO", help="who promotes, for the history")
    parser.add_argument("--note", metavar="TEXT", help="why, for the history")
    parser.add_argument("--rollback", action="store_true", help="back to the run that had the name before")
    parser.add_argument("--list", action="store_true", help="show all aliases, or with --to the history of one")
    parser.add_argument("--root", metavar="DIR", help=f"directory of the runs for --rollback and --list ({ROOT})")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and move nothing")
    add_options(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
