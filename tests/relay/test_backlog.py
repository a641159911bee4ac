"""What waits for one slow destination."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.backlog import Backlog, Waiting
from relay.counters import Kind


def waiting(source: int, size: int = 1) -> Waiting:
    return Waiting(bytes([source]) * size, bytes([source]), 0.0)


def test_disco_first_and_in_order() -> None:
    """Each queue keeps its order; a batch has one packet at least."""
    backlog = Backlog(4)
    for kind, source in ((Kind.OTHER, 1), (Kind.DISCO, 2), (Kind.OTHER, 3), (Kind.DISCO, 4)):
        backlog.push(kind, waiting(source, 10))
    assert [each.source[0] for each in backlog.pop(1)] == [2]
    assert [each.source[0] for each in backlog.pop(100)] == [4, 1, 3]
    assert not backlog
    assert backlog.pop(100) == []


def test_with_one_sender_the_oldest_is_dropped() -> None:
    """That is derper's rule."""
    backlog = Backlog(2)
    assert [backlog.push(Kind.OTHER, waiting(1, size)) for size in (5, 6)] == [None, None]
    assert backlog.push(Kind.OTHER, waiting(1, 7)) == waiting(1, 5)
    assert backlog.size_bytes == 13


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 4), st.integers(1, 9))))
def test_bounds_and_bytes_add_up(pushes: list[tuple[Kind, int, int]]) -> None:
    """Never more than the depth per queue; nothing vanishes but the victims; none of them is from
    a sender that holds fewer packets than another."""
    backlog = Backlog(3)
    held: dict[Kind, list[Waiting]] = {kind: [] for kind in Kind}
    for kind, source, size in pushes:
        new = waiting(source, size)
        victim = backlog.push(kind, new)
        if victim is not None:
            shares = [each.source for each in held[kind]]
            assert shares.count(victim.source) == max(map(shares.count, shares))
            position = next(i for i, each in enumerate(held[kind]) if each is victim)
            assert victim.source not in shares[:position]
            del held[kind][position]
        held[kind].append(new)
        assert len(held[kind]) <= 3
        everything = held[Kind.DISCO] + held[Kind.OTHER]
        assert backlog.size_bytes == sum(len(each.frame) for each in everything)
        assert backlog.packets == len(everything)
    assert [each for _, each in backlog.clear()] == held[Kind.DISCO] + held[Kind.OTHER]
    assert backlog.size_bytes == 0
