"""How the `underpass` commands end."""

from __future__ import annotations

import sys
from typing import Final, NoReturn

import click

FAILED: Final = 1
WRONG_USE: Final = 2
"""The command line, or a file that it names, is wrong; click's own status for that."""


def fail(text: str, status: int) -> NoReturn:
    """End the program with a line that says why and what to do."""
    click.echo(f"underpass: {text}", err=True)
    sys.exit(status)
