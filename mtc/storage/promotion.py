"""An alias moves: to a run that is whole, can be served and is within a gate, or back to the one before."""

from __future__ import annotations

import posixpath
from datetime import UTC, datetime
from typing import NamedTuple

from mtc.results import Check, Figures, Gate, figures_of, hold
from mtc.storage.aliases import Alias, Move, last_known, move_alias, require_alias_name, take_back
from mtc.storage.one_model import as_one_model
from mtc.storage.runs import RunDirectory, RunError, load_analysis


class GateError(RunError):
    """A run is not within the gate; `checks` are all that was held against it. Nothing has moved."""

    exit_code = 3
    event = "refused"

    def __init__(self, message: str, checks: list[Check]):
        super().__init__(message)
        self.checks = checks


class Promotion(NamedTuple):
    """What has moved, or would."""

    alias: Alias
    """As it is now."""
    previous: str | None
    """The run that had the name; None if none had."""
    checks: list[Check]
    """Every limit that the run was held to."""


class Rollback(NamedTuple):
    """What was taken back, or would be."""

    alias: Alias
    """As it is now."""
    previous: str
    """The run that had the name."""
    passed_over: dict[str, str]
    """Runs that had it before and can't be served any more, with the reasons."""


def root_of(run: RunDirectory) -> str:
    """The directory of runs that a finished run lies in. Raises RunError if it lies elsewhere than its name says."""
    root = run.url.rstrip("/").removesuffix(f"/{run.run_id}")
    if root == run.url.rstrip("/"):
        raise RunError(f"{run.url} holds the run {run.run_id!r}, which an alias would look for under that name")
    return root


def promote(
    run: RunDirectory, name: str, gate: Gate | None = None, forget_gate: bool = False, by: str | None = None,
    note: str | None = None, dry_run: bool = False,
) -> Promotion:  # fmt: skip
    """Give a verified run a name beside it. Without a gate the alias's own holds, which `forget_gate` drops; a gate
    that is given becomes the alias's own.

    Raises RunError for a run that can't be served, was not analysed or is removed meanwhile, GateError for one that is
    not within the gate.
    """
    root = root_of(run)
    require_alias_name(root, name)
    as_one_model(run)
    result: list[Promotion] = []
    was: list[Alias | None] = []

    def decide(before: Alias | None) -> Alias:
        was.append(before)
        asked = gate or (before.gate if before and not forget_gate else None)
        figures, checks = _figures(run, required=asked is not None), list[Check]()
        if asked:
            checks = hold(asked, figures, _now(root, before))
        if broken := [check for check in checks if check.problem]:
            message = (
                f"{run.run_id} does not become {name}: {len(broken)} of {len(checks)} limits of the gate do not hold"
            )
            raise GateError(message, checks)
        move = Move(run_id=run.run_id, when=_time(), what="promoted", figures=figures, by=by, note=note)
        after = Alias(run_id=run.run_id, history=(*(before.history if before else ()), move), gate=asked)
        result.append(Promotion(after, before.run_id if before else None, checks))
        return after

    if dry_run:
        decide(last_known(root, name))
    else:
        moved = move_alias(root, name, decide)
        if not run.is_finished():
            take_back(root, name, moved, was[-1])
            raise RunError(f"{run.url} was removed while it was promoted: {name} is what it was")
    return result[-1]


def roll_back(root: str, name: str, by: str | None = None, note: str | None = None, dry_run: bool = False) -> Rollback:
    """Give the name back to the run that had it before and is whole, without a gate.

    Raises RunError if there is none.
    """
    result: list[Rollback] = []

    def decide(now: Alias | None) -> Alias:
        if now is None:
            raise RunError(f"{root} has no alias {name!r}")
        passed_over: dict[str, str] = {}
        for run_id in now.before():
            run = RunDirectory(posixpath.join(root, run_id), run_id)
            try:
                run.verify()
                as_one_model(run)
            except (RunError, ValueError) as error:
                passed_over[run_id] = str(error)
                continue
            move = Move(run_id=run_id, when=_time(), what="rolled back", figures=_figures(run), by=by, note=note)
            after = Alias(run_id=run_id, history=(*now.history, move), gate=now.gate)
            result.append(Rollback(after, now.run_id, passed_over))
            return after
        reasons = "".join(f"\n  {run_id}: {reason}" for run_id, reason in passed_over.items())
        raise RunError(f"{name} has no run to go back to from {now.run_id}{reasons}")

    if dry_run:
        decide(last_known(root, name))
    else:
        move_alias(root, name, decide)
    return result[-1]


def _figures(run: RunDirectory, required: bool = False) -> dict[str, Figures]:
    """By the name of each transcoder; without those that have no analysis, unless they are required."""
    found = {}
    for name, own in run.members().items():
        try:
            found[name] = figures_of(load_analysis(own).summary)
        except (RunError, ValueError) as error:
            if required:
                message = f"{own.url}: the gate needs an analysis that can be read: {error}"
                raise RunError(message.splitlines()[0]) from error
    return found


def _now(root: str, alias: Alias | None) -> dict[str, Figures | None] | None:
    """The figures of what is promoted, by its files, or else as they were written down when it was."""
    if alias is None:
        return None
    written: dict[str, Figures] = alias.history[-1].figures if alias.history else {}
    try:
        run = RunDirectory(posixpath.join(root, alias.run_id), alias.run_id)
        return dict.fromkeys(run.members()) | written | _figures(run)
    except (RunError, ValueError):
        return dict(written)


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
