"""List the runs of a directory or URL, show one, and remove what nobody needs any more.

    python jobs/runs.py list runs                    # --json: one array
    python jobs/runs.py show runs/first
    python jobs/runs.py rm runs/first                # says what would go; --yes removes it
    python jobs/runs.py gc runs --older-than 30      # says what would go; --yes removes it

`gc` removes checkpoints of finished runs, runs that are not finished and were not written for days, token stores that
no run names, and what dead jobs left. Nothing goes that an alias names, a living job holds, or a run may read.

Exit codes: 0 done, 1 the storage fails, or some of it could not be removed, 2 no such run, or it must not be removed.
"""

from __future__ import annotations

import argparse
import json
import logging
import posixpath
from collections.abc import Sequence

from jobs.command_line import failed, run_program
from mtc.errors import MtcError, one_line
from mtc.programs import described
from mtc.storage import (
    Checkpoints,
    RunError,
    RunRow,
    Waste,
    absolute,
    check_removable,
    find_waste,
    list_runs,
    named_run,
    remove_run,
    remove_waste,
    repair_index,
    stored_files,
    token_stores,
)
from mtc.telemetry import configure

logger = logging.getLogger(__name__)
OLDER_THAN = 7.0
"""Days after which gc takes a run that is not finished for given up."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        configure()
        return int(arguments.do(arguments))
    except Exception as error:
        return failed(error)


def list_all(arguments: argparse.Namespace) -> int:
    rows = list_runs(arguments.root)
    if arguments.json:
        print(json.dumps([row.model_dump(mode="json") for row in rows]))
        return 0
    head = ("run", "when (UTC)", "state", "model", "layers", "features", "fvu", "recovered", "size", "aliases")
    for line in _table([head, *map(_cells, rows)]):
        print(line)
    return 0


def show(arguments: argparse.Namespace) -> int:
    run = named_run(arguments.run)
    root, name = posixpath.split(run.url.rstrip("/"))
    row = next((row for row in list_runs(root) if row.run_id == name), None)
    if row is None:
        raise RunError(f"no run at {run.url}")
    files = stored_files(run)
    stores, known = token_stores(run)
    checkpoints = [file for file in files if file.name.startswith("checkpoints/")]
    print("\n".join(_table([("run", "when (UTC)", "state", "model", "layers", "features"), _cells(row)[:6]])))
    print(f"  {run.url}")
    print(f"  fvu {_range(row.fvu)}, loss recovered {_range(row.loss_recovered)}")
    print(f"  aliases: {', '.join(row.aliases) or 'none'}")
    print(f"  tokens: {', '.join(sorted(stores)) or ('none' if known else 'not known')}")
    names = sorted({file.name.split("/")[1] for file in checkpoints})
    newest = Checkpoints(run.url).latest() if names else None
    about = f"{len(names)}, {_size(sum(file.bytes for file in checkpoints))}"
    print(f"  checkpoints: {about}, newest complete: {newest.name if newest else 'none'}" if names else
          "  checkpoints: none")  # fmt: skip
    for file in files:
        if file not in checkpoints:
            print(f"  {file.bytes:>15,} {file.name}")
    print(f"  {sum(file.bytes for file in files):>15,} in all, in {len(files)} files")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    run = named_run(arguments.run)
    check_removable(run, arguments.force)
    if not arguments.yes:
        size = sum(file.bytes for file in stored_files(run))
        print(f"would remove {run.url}, {_size(size)}; --yes removes it")
        return 0
    print(f"removed {run.url}, {_size(remove_run(run, arguments.force))}")
    return 0


def collect(arguments: argparse.Namespace) -> int:
    days = arguments.older_than
    found = find_waste(arguments.root, days, arguments.tokens, arguments.also)
    errors, done, runs_stay = 0, list[Waste](), False
    for waste in found.waste:
        line = f"{_size(waste.bytes):>9}  {waste.kind} {waste.url}: {waste.reason}"
        try:
            if waste.kind == "token store" and runs_stay:
                raise RunError("a run that was to go stays, and may read it")
            if arguments.yes:
                remove_waste(waste, days, [arguments.root, *arguments.also])
            print(f"{'removed' if arguments.yes else 'would remove'} {line}")
            done.append(waste)
        except Exception as error:  # of one place; the others go all the same
            errors += not isinstance(error, MtcError)
            runs_stay |= waste.kind == "unfinished run"
            print(f"stays {line}; but {one_line(error)}")
    for line in found.kept:
        print(f"stays {line}")
    total = _size(sum(waste.bytes for waste in done))
    if arguments.yes:
        added, gone = repair_index(arguments.root)
        print(f"removed {total} in all; index of {absolute(arguments.root)}: {added} added, {gone} removed")
    else:
        print(f"would remove {total} in all; nothing was removed: --yes does it")
    return 1 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=described(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all runs of a directory, newest first")
    listing.add_argument("root", metavar="ROOT", help="directory or URL of runs, as output.root")
    listing.add_argument("--json", action="store_true", help="one JSON array, an object for each run")
    listing.set_defaults(do=list_all)
    showing = commands.add_parser("show", help="one run in detail: its files, tokens and checkpoints")
    showing.add_argument("run", metavar="RUN", help="a run directory or URL, or ROOT/latest")
    showing.set_defaults(do=show)
    removing = commands.add_parser("rm", help="remove a run")
    removing.add_argument("run", metavar="RUN", help="a run directory or URL; never one that an alias names")
    removing.add_argument("--yes", action="store_true", help="remove it; without, say what would go")
    removing.add_argument(
        "--force",
        action="store_true",
        help="also what `latest` names, which then names the newest that is left, or what a rollback would go back to",
    )
    removing.set_defaults(do=remove)
    collecting = commands.add_parser("gc", help="remove what nobody needs")
    collecting.add_argument("root", metavar="ROOT", help="directory or URL of runs, as output.root")
    collecting.add_argument("--yes", action="store_true", help="remove it; without, say what would go")
    collecting.add_argument(
        "--older-than", type=_days, default=OLDER_THAN, metavar="DAYS",
        help="age of the newest file of unfinished runs and of token stores that go (default: %(default)g)",
    )  # fmt: skip
    collecting.add_argument(
        "--tokens", metavar="DIR", help="directory of token stores, such as ~/.cache/mtc/tokens (default: ROOT/tokens)"
    )
    collecting.add_argument(
        "--also", action="append", default=[], metavar="ROOT", help="another directory of runs that read these tokens"
    )
    collecting.set_defaults(do=collect)
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < 1e5:
        raise argparse.ArgumentTypeError(f"{text}: a number of days from 0 to 100,000 is wanted")
    return days


def _cells(row: RunRow) -> tuple[str, ...]:
    layers = [str(layer) for layer in row.layers]
    shown = ",".join(layers) if len(layers) < 4 else f"{layers[0]}..{layers[-1]} ({len(layers)})"
    when = row.when[:16].replace("T", " ")
    return (row.run_id, when, row.state, row.base_model, shown, str(row.num_features or ""), _range(row.fvu),
            _range(row.loss_recovered), _size(row.bytes), ",".join(row.aliases))  # fmt: skip


def _range(values: Sequence[float]) -> str:
    """One figure, or the smallest and the largest of several."""
    shown = sorted({f"{value:.3f}" for value in values}, key=float)
    return "-" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]}..{shown[-1]}"


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    run_program(main)
