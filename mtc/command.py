"""The command `mtc`: the programs of `jobs/` and `serve/` by one name, each imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mtc import programs

COMMANDS = {
    "train": ("jobs.train", "train transcoders from a preset or a file, analyse them, write the report"),
    "check": ("jobs.check", "say in seconds what of a run would fail, without a GPU and without starting Ray"),
    "status": ("jobs.status", "how far a run is, and how the last job that began work ended"),
    "runs": ("jobs.runs", "list the runs of a directory, show one, remove what is no longer wanted"),
    "promote": ("jobs.promote", "give a run a name, such as production, that services follow"),
    "analyze": ("jobs.analyze", "analyse a finished run again, or compare two"),
    "label": ("jobs.label", "let a language model name a run's features, and score its labels"),
    "graph": ("jobs.graph", "draw the attribution graph of a prompt's next token"),
    "export": ("jobs.export", "write a run in another library's format, push it to the hub, import others' weights"),
    "serve": ("serve.app", "answer over HTTP which features a text activates, on a running Ray cluster"),
    "keys": ("serve.keys", "make and remove the API keys of a service"),
    "environment": ("serve.environment", "what the shell exports before `ray start` on a machine that serves"),
    "quickstart": ("jobs.quickstart", "on this machine: start Ray, train, serve, ask; or serve, or stop"),
    "completion": ("jobs.completion", "completion of commands and options for bash or zsh"),
}
"""Module and purpose of each command, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code of what `mtc` does itself, a program's ends the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if first in ("-V", "--version"):
        from importlib.metadata import version  # 40 ms, which only this needs

        print(f"mtc {version('mtc')}")
        return 0
    if first not in COMMANDS:
        from mtc.config import suggestion  # with pydantic: 0.3 s, which only a mistake costs

        print(f"mtc: {first!r} is no command{suggestion(first, list(COMMANDS))}", file=sys.stderr)
        print(f"commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    run(first, arguments[1:])
    return 0


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a program as its file does, and end the process with its exit code as the file does."""
    programs.put_first()
    sys.argv = [programs.PREFIX + command, *arguments]  # argparse takes the program's name from here
    program = import_module(COMMANDS[command][0])
    import_module("jobs.command_line").run_program(program.main, list(arguments))


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {command:{width}}  {purpose}" for command, (_, purpose) in COMMANDS.items()]
    return "\n".join([
        "usage: mtc COMMAND [OPTIONS]",
        "",
        "Matryoshka transcoders: train them on a Ray cluster, analyse, label, share and serve them.",
        "",
        *lines,
        "",
        "`mtc COMMAND --help` shows a command's options. `mtc --version` says which this is.",
        "In a source tree `python jobs/COMMAND.py` runs the same programs, also under `ray job submit`.",
    ])  # fmt: skip
