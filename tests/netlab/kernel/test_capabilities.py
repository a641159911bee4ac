"""What `doctor` will say: features, and what is used instead of missing ones."""

from __future__ import annotations

import pytest

from netlab.kernel import capabilities
from netlab.kernel.jail import JailError


def test_every_feature_says_what_is_used() -> None:
    """Available features give no reason; missing ones do; all say what happens."""
    found = capabilities.examine()
    assert found[0].name == "jail"
    for capability in found:
        assert capability.used
        assert bool(capability.why) != capability.available
    if found[0].available:
        assert {"veth", "nftables", "tun", "conntrack"} <= {c.name for c in found}


def test_without_a_jail_only_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else can be tried, and the simulated back end is what is left."""

    def refuse(*_: object, **__: object) -> bytes:
        raise JailError("set the sysctl x")

    monkeypatch.setattr(capabilities, "call_in_jail", refuse)
    (only,) = capabilities.examine()
    assert (only.name, only.available, only.why) == ("jail", False, "set the sysctl x")
    assert "simulated" in only.used
