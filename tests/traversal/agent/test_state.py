"""What the agent keeps in its state file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.agent.state import remembered
from traversal.paths.punch_facts import Strategy
from traversal.paths.punch_memory import PunchMemory

PEER = bytes(32)


def test_lessons_outlive_the_agent(tmp_path: Path) -> None:
    """What worked and how long mappings live is there the next time, with nothing in the way of
    another attempt."""
    path = tmp_path / "underpass.state"
    with remembered(path) as memory:
        memory.note_success("home", PEER, Strategy.BIRTHDAY_HARD, now=1000.0)
        memory.note_failure("home", bytes([1] * 32), Strategy.BIRTHDAY_HARD, now=1000.0)
        memory.note_lifetime("home", 115.0)
    with remembered(path) as memory:
        record = memory.recall("home", PEER)
        assert record.worked is Strategy.BIRTHDAY_HARD
        assert record.allowed_at < 0.0
        assert memory.lifetime("home") == 115.0
        assert memory.recall("home", bytes([1] * 32)).failures == 0


def test_nothing_learned_leaves_no_file(tmp_path: Path) -> None:
    """An agent whose peers are all easy to reach writes nothing."""
    path = tmp_path / "underpass.state"
    with remembered(path):
        pass
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"worked": 1}'])
def test_broken_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    """A file that can't be read costs its content and nothing else."""
    path = tmp_path / "underpass.state"
    path.write_bytes(content)
    with remembered(path) as memory:
        assert memory.recall("home", PEER).worked is None
        memory.note_lifetime("home", 25.0)
    assert json.loads(path.read_text())["lifetimes"] == {"home": 25.0}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.just("birthday-hard"),
    lambda inner: (
        st.dictionaries(st.text(max_size=4) | st.just("worked"), inner, max_size=3)
        | st.lists(inner, max_size=2)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_makes_a_memory(data: object) -> None:
    """Whatever a state file says, the agent starts."""
    PunchMemory.from_dict(data).to_dict()
