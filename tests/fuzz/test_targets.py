"""Every target of the fuzzer for a moment: its samples, random bytes, and samples with changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target


def check(target: Target, data: bytes) -> None:
    try:
        target.read(data)
    except target.errors:
        pass


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_survives(name: str, data: st.DataObject) -> None:
    """Whatever bytes come, a parser returns or raises its own error."""
    target = TARGETS[name]
    check(target, data.draw(st.binary(max_size=300)))
    if target.samples:
        sample = bytearray(data.draw(st.sampled_from(target.samples)))
        for _ in range(data.draw(st.integers(0, 4))):
            sample[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
        check(target, bytes(sample))
        check(target, bytes(sample) + data.draw(st.binary(max_size=50)))
