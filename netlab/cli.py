"""The `underpass-lab` command."""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """To be described."""


if __name__ == "__main__":
    main()
