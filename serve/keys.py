"""The command that makes the file of API keys.

    python -m serve.keys add NAME --file keys.json [--admin] [--expires 2027-01-31]
    python -m serve.keys remove NAME --file keys.json [--sha256 START]
    python -m serve.keys list --file keys.json

The file holds no key, only its sha256. A running service sees changes within a second or two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from mtc.programs import described, program_name
from serve.http import KeyFileError, add_key, read_keys, remove_keys


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("python -m serve.keys"),
        description=described(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["add", "remove", "list"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--admin", action="store_true", help="the key may load runs")
    parser.add_argument("--expires", type=date.fromisoformat, metavar="DATE", help="last day of the key, UTC")
    parser.add_argument("--sha256", default="", help="remove only keys whose digest, which `list` shows, begins so")
    options = parser.parse_args(argv)
    if (options.name is None) != (options.action == "list"):
        parser.error(f"{options.action} {'takes no' if options.name else 'needs a'} NAME")
    try:
        if options.action == "add":
            print(add_key(options.file, options.name, options.admin, options.expires))
        elif options.action == "remove":
            count = remove_keys(options.file, options.name, options.sha256)
            print(f"removed {count}")
            return 0 if count else 1
        else:
            for entry in read_keys(options.file).keys:
                until = f" until {entry.expires}" if entry.expires else ""
                print(f"{entry.name} {entry.sha256[:12]}{' admin' if entry.admin else ''}{until}")
    except KeyFileError as error:
        print(f"{program_name('serve.keys')}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
