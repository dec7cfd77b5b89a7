"""What ends a job: one class for all that whoever started it can do something about."""

from __future__ import annotations

import re
from typing import ClassVar

_ADVICE = re.compile(r"\nFailed to .* after \d+/\d+ attempts ")


class MtcError(Exception):
    """A job cannot go on; the message names the fields, files or limits, and what can be done.

    Jobs end with `exit_code` and show the message as their last line, without a traceback.
    """

    exit_code: ClassVar[int] = 2
    """Exit code of a job that the error ends; 2 is for what comes again until something is changed."""
    event: ClassVar[str] = "error"
    """Kind of the error in JSON lines, and the beginning of its line."""

    @property
    def permanent(self) -> bool:
        """Whether it comes again however often the same is tried."""
        return self.exit_code == 2


def known_cause(error: BaseException) -> MtcError | None:
    """The MtcError that an error comes from, whatever has wrapped it; None if it comes from none.

    Ray keeps the error of a task in `cause`, Ray Train those of its trainers in `worker_failures` and that of its
    controller in `controller_failure`. Ray Data appends advice on its own settings to the message, which is cut off.
    """
    found: list[BaseException | None] = [error]
    for one in found:
        if one is None:
            continue
        inner = getattr(one, "cause", None)
        if isinstance(one, MtcError) and inner is None:
            one.args = tuple(_ADVICE.split(arg)[0] if isinstance(arg, str) else arg for arg in one.args)
            return one
        failures = getattr(one, "worker_failures", {}).values()
        within = (inner, one.__cause__, getattr(one, "controller_failure", None), *failures)
        found += [each for each in within if isinstance(each, BaseException) and each not in found]
    return None


def exit_code(error: BaseException) -> int:
    """Exit code of a job that an error ends, whatever has wrapped it."""
    known = known_cause(error)
    return known.exit_code if known else 130 if isinstance(error, KeyboardInterrupt) else 1


def one_line(error: BaseException) -> str:
    """An error in one line, also one that Ray has wrapped in pages: its kind, and the line that says why."""
    text = re.sub(r"\nAt:\n(?:[ \t]+.*(?:\n|$))*", "\n", str(error))  # torch's: the places of what C++ called back
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    low = next((line for line in lines if "low on memory" in line), None)  # what follows is the whole node's account
    reason = low or (lines[-1] if lines else "")
    reason = re.split(r"\s*(?:Some common causes|There are some potential)", reason)[0]
    return f"{type(error).__name__}: {reason}"[:400]
