"""Runs a Trio function as a program of its own, for the kernel back end.

    python -m netlab.program module:function [ARGUMENT...]

The function is called as ``await function(say, *arguments)``, where `say` prints a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import trio

from netlab.labs import ProgramError, load_entry


def main(arguments: Sequence[str]) -> None:
    """Run it; the exit status is 2 if there is no such function."""
    if not arguments:
        sys.exit("usage: python -m netlab.program module:function [ARGUMENT...]")
    try:
        entry = load_entry(arguments[0])
    except ProgramError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    def say(line: str) -> None:
        print(line, flush=True)

    trio.run(entry, say, *arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
