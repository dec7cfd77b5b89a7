"""Print a script with which the shell completes the commands of `mtc`, their options and the names of presets.

    mtc completion bash > ~/.local/share/bash-completion/completions/mtc
    mtc completion zsh > ~/.mtc-completion.zsh      # and in ~/.zshrc, after compinit: source ~/.mtc-completion.zsh

The script is fixed text, so that a TAB starts no Python; make it again after an update.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from importlib import import_module
from unittest import mock

from jobs.command_line import run_program
from mtc.command import COMMANDS
from mtc.config import preset_names

SHELLS = ("bash", "zsh")
FUNCTION = """_mtc() {
    local words="" current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="%s"
    else
        case "${COMP_WORDS[1]} $previous" in
%s
        *) case "${COMP_WORDS[1]}" in
%s
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell), end="")
    return 0


def script(shell: str) -> str:
    """The script for one of SHELLS; files are completed where nothing else is known."""
    words, values = [], []
    for command in COMMANDS:
        parser = _parser(command)
        words.append(f'            {command}) words="{" ".join(_words(parser))}" ;;')
        values += [f'        "{command} {option}") words="{" ".join(known)}" ;;' for option, known in _values(parser)]
    function = FUNCTION % (" ".join(COMMANDS), "\n".join(values), "\n".join(words))
    before = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"{before}{function}complete -o default -o bashdefault -F _mtc mtc\n"


class _Asked(BaseException):
    """What a program is interrupted by when it is about to parse its arguments: no handler of its own catches it."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command's program, as complete as when the program uses it."""

    def stop(parser: argparse.ArgumentParser, *arguments: object, **options: object) -> None:
        raise _Asked(parser)

    program = import_module(COMMANDS[command][0])
    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), mock.patch.object(signal, "signal"):
            program.main([])
    except _Asked as asked:
        return asked.parser
    raise AssertionError(f"mtc {command} parses no arguments")


def _words(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options, and what may stand without one, of the parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if not action.option_strings:
            yield from map(str, action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            yield from (word for each in action.choices.values() for word in _words(each))


def _values(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Options whose values are known, with these."""
    for action in parser._actions:
        known = preset_names() if "--preset" in action.option_strings else [str(each) for each in action.choices or ()]
        for option in action.option_strings if known else ():
            yield option, known
        if isinstance(action, argparse._SubParsersAction):
            yield from (pair for each in action.choices.values() for pair in _values(each))


if __name__ == "__main__":
    run_program(main)
