"""What all commands of `underpass-lab` share: errors, options, scenarios by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click
import msgspec
import trio
from rich.markup import escape

from netlab.behavior import ModelError, suggest
from netlab.choice import BackEndError, Wish
from netlab.kernel.builder import BuildError
from netlab.kernel.fabric_client import FabricError
from netlab.kernel.jail import JailError
from netlab.kernel.netfilter import NftError
from netlab.labs import BackEnd, ProgramError
from netlab.run_directory import RunDirectoryError
from netlab.scenario import Scenario
from netlab.scenario_file import ScenarioError, parse_scenario
from netlab.terminal import error_console

_P = ParamSpec("_P")
_R = TypeVar("_R")

AS_EXPECTED, UNEXPECTED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def refuse(problem: object) -> NoReturn:
    error_console.print(f"[bold red]underpass-lab:[/] {escape(str(problem))}")
    sys.exit(WRONG_USE)


def _stop() -> NoReturn:
    error_console.print("underpass-lab: interrupted; the lab is gone and left nothing behind")
    sys.exit(INTERRUPTED)


# What the user can do something about; everything else is a fault of ours.
_EXPECTED = (
    BackEndError,
    BuildError,
    FabricError,
    JailError,
    ModelError,
    NftError,
    ProgramError,
    RunDirectoryError,
    ScenarioError,
)


def explain_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Show errors that the user can do something about as one line."""

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except _EXPECTED as error:
            refuse(error)
        except BaseExceptionGroup as group:
            # Nurseries wrap what is raised in them, once for each.
            interrupts, others = group.split(KeyboardInterrupt)
            if interrupts is not None:
                _stop()
            if others is None or others.split(_EXPECTED)[1] is not None:
                raise
            leaf: BaseException = others
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            refuse(leaf)
        except KeyboardInterrupt:
            _stop()

    return wrapped


def run_trio(back_end: BackEnd, function: Callable[..., Any], *args: object) -> Any:
    """Run a Trio function, in the simulated internet on a clock that jumps over idle time.

    The result is whatever the function returns, hence Any.
    """
    if back_end is BackEnd.KERNEL:
        return trio.run(function, *args)
    from trio.testing import MockClock

    return trio.run(function, *args, clock=MockClock(autojump_threshold=0))


def examples() -> dict[str, Path]:
    """Return the scenarios that come with the lab, by name."""
    folder = Path(__file__).parent / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_scenario(name: str) -> tuple[Scenario, str]:
    """Read a file, or an example by its name."""
    path = Path(name)
    if not path.exists() and name in examples():
        path = examples()[name]
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [*examples(), *(str(p) for p in Path().glob("*.toml"))]
        raise ScenarioError(
            f"there is no file {name} and no example of that name; {suggest(name, known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot read {name}: {error}") from error
    return parse_scenario(text, path.name), text


backend_option = click.option(
    "--backend",
    "wish",
    type=click.Choice([wish.value for wish in Wish]),
    callback=lambda _context, _option, value: Wish(value),
    default=Wish.ANY.value,
    show_default=True,
    help="What makes the network; any means the kernel where it is possible.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
