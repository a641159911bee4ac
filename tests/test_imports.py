"""What commands and packages import at once: names of modules, since times vary.

Trio, cryptography and the node take half a second to import and more on small machines, for which
a help text, a key, or a program that wants one exception class should not wait.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from click import Context

import traversal
from netlab.cli import COMMANDS
from netlab.commands import commands
from relay.cli import ELSEWHERE
from relay.cli import main as relay_command

SLOW = {"aioice", "cryptography", "dns", "h2", "msgspec", "nacl", "qh3", "rich", "ssl", "trio"}


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("statement", "needed"),
    [
        ("import traversal", set()),
        ("from traversal import NodePrivate", {"nacl"}),
        ("import traversal.cli", set()),
        ("from traversal.cli import main; main(['--help'], standalone_mode=False)", set()),
        ("from traversal.cli import main; main(['keygen'], standalone_mode=False)", {"nacl"}),
        ("import relay.cli", set()),
        ("from relay.cli import main; main(['--help'], standalone_mode=False)", set()),
        ("from netlab.cli import main; main(['--help'], standalone_mode=False)", set()),
    ],
)
def test_imports_nothing_slow(statement: str, needed: set[str]) -> None:
    """Neither packages that are slow to import, nor the node and the relay."""
    found = imported_by(statement)
    assert {name for name in found if name in SLOW} == needed
    assert not found & {"traversal.node", "traversal.agent.service", "relay.server", "relay.config"}


def test_a_node_needs_no_quic() -> None:
    """Few nodes have an edge: what it takes is imported by those."""
    assert not imported_by("from traversal import open_node") & {"qh3", "h2", "dns", "rich"}


def test_every_public_name_is_there() -> None:
    """Names that are imported late are imported from where they are, and listed."""
    assert set(traversal._MODULE_OF) == set(traversal.__all__)
    for name in traversal.__all__:
        assert getattr(traversal, name).__name__ == name
    assert set(traversal.__all__) <= set(dir(traversal))
    with pytest.raises(AttributeError, match="has no attribute 'open_nodes'"):
        _ = traversal.open_nodes


def test_list_of_the_labs_commands_is_true() -> None:
    """It has all of them, with the words that they have themselves."""
    context = Context(commands)
    assert list(COMMANDS) == commands.list_commands(context)
    for name, text in COMMANDS.items():
        command = commands.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(limit=80) == text


def test_list_of_commands_is_true() -> None:
    """The relay's commands that are imported late exist and begin as the list says."""
    context = Context(relay_command)
    for name, (_, text) in ELSEWHERE.items():
        command = relay_command.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(limit=200).split()[0] == text.split()[0]
