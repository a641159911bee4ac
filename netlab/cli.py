"""The command `underpass-lab`: its help, and the way to the commands in `netlab.commands`.

Those import half of the lab, which takes half a second: a help text must not cost that.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Final

import click

COMMANDS: Final = {
    "capture": "Write a run's packets for Wireshark, with drop reasons.",
    "demo": "Watch nodes behind NATs find each other. Start here.",
    "doctor": "Tell what this machine can do, and what is missing.",
    "examples": "List the scenarios that come with the lab.",
    "explain": "Tell why two hosts of a run could or could not talk.",
    "matrix": "Run a pair of programs over every pair of NATs.",
    "plan": "Print what a SCENARIO would build; build nothing.",
    "presets": "List the NATs and links that scenarios can name.",
    "report": "Write the HTML page of a saved run again.",
    "run": "Run a SCENARIO, judge it, and write a report.",
    "shell": "Open a shell in HOST of a SCENARIO on the kernel back end.",
    "verify": "Measure every NAT of a SCENARIO against what it claims.",
}
"""What the list of commands says of each; a test compares it with what they say themselves."""


class _Group(click.Group):
    """Imports the commands only when one of them is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from netlab.commands import commands

        return commands.get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in near:
            # click itself knows only of commands that are loaded.
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="underpass")
def main() -> None:
    """Any NAT, any network trouble, on a laptop, in CI and in simulation.

    A SCENARIO is a TOML file, or the name of an example (see `underpass-lab examples`): hosts,
    servers, the NATs between them (see `underpass-lab presets`), programs to run, and what should
    happen. Two back ends run it: the Linux kernel's network namespaces, inside a jail that needs no
    root and lets nothing out, and an internet in memory with a virtual clock.

    Start with `underpass-lab demo`.
    """


if __name__ == "__main__":
    main()
