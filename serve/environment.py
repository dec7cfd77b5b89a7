"""Print what the shell must export before `ray start` on a machine whose Ray serves: `serve.contract.ENVIRONMENT`.

    eval "$(python -m serve.environment /tmp/mine)" && ray start --head --temp-dir=/tmp/mine

Of the wheel's programs PYTHONPATH is among it, so that `serve run serve.app:build` finds them.

With a directory of one's own, several users, or several Rays, of one machine can serve: HAProxy's files go there, and
its ports are free ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from mtc.errors import MtcError
from mtc.programs import described, exported, program_name
from mtc.storage import check_writable
from serve.contract import ENVIRONMENT, free_ports, proxy_files

LONGEST = 27
"""Longest path in bytes of the directory: HAProxy's sockets lie in it, and theirs have 107 at most."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("python -m serve.environment"),
        description=described(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="?", help="for HAProxy's files; by default Ray's fixed one and fixed ports")
    directory = parser.parse_args(argv).directory
    environment = ENVIRONMENT | exported()
    if directory:
        directory = os.path.abspath(directory)
        try:
            if len(os.fsencode(directory)) > LONGEST:
                raise MtcError(
                    f"{directory} has {len(os.fsencode(directory))} bytes; sockets lie in it: at most {LONGEST}"
                )
            check_writable(directory, directory)
        except MtcError as error:
            print(f"{program_name('serve.environment')}: {error}", file=sys.stderr)
            return 2
        environment |= free_ports() | proxy_files(directory)
    for name, value in environment.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
