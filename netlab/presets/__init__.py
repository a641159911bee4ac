"""Named behaviours of real devices, carriers and links, from the data files beside this module.

A NAT preset says which class it claims, and `underpass-lab verify` measures whether it keeps the
promise; no preset exists without that. Claims of chains name the class of the whole chain.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from netlab.behavior import (
    Filtering,
    Hairpin,
    Link,
    Mapping,
    ModelError,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    suggest,
)
from netlab.records import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class NatPreset:
    """A NAT, or two in series, as seen in the world."""

    name: str
    claims: str
    """``EIM+APDF`` and the like, ``portal`` or ``no-udp``; of the whole chain."""
    seen_on: str
    """Where such a NAT is found, and the source."""
    behavior: NatBehavior = NatBehavior()  # noqa: RUF009  # frozen
    behind: str | None = None
    """The preset of the NAT that this one's uplink leads to, for chains."""


@cache
def nat_presets() -> dict[str, NatPreset]:
    """Return all NAT presets by name."""
    presets: dict[str, NatPreset] = {}
    for name, table in _load("nat.toml").items():
        inherited = table.pop("like", None)
        base = presets[inherited].behavior if isinstance(inherited, str) else NatBehavior()
        head = {key: str(table.pop(key)) for key in ("claims", "seen_on")}
        behind = table.pop("behind", None)
        presets[name] = NatPreset(
            name=name,
            behavior=read_record(NatBehavior, table, f'preset "{name}"', base),
            behind=str(behind) if behind is not None else None,
            **head,
        )
    return presets


@cache
def link_presets() -> dict[str, Link]:
    """Return all link presets by name."""
    return {
        name: read_record(Link, table, f'link preset "{name}"')
        for name, table in _load("link.toml").items()
    }


def nat_preset(name: str) -> NatPreset:
    """Return a NAT preset.

    Raises:
        ModelError: there is none of that name; names the nearest.
    """
    try:
        return nat_presets()[name]
    except KeyError:
        known = nat_presets()
        raise ModelError(f'preset "{name}"', f"unknown; {suggest(name, known)}") from None


def link_preset(name: str) -> Link:
    """Return a link preset.

    Raises:
        ModelError: there is none of that name; names the nearest.
    """
    try:
        return link_presets()[name]
    except KeyError:
        known = link_presets()
        raise ModelError(f'link preset "{name}"', f"unknown; {suggest(name, known)}") from None


def class_behavior(class_name: str) -> NatBehavior:
    """Return the plainest NAT of one of the nine classes, such as ``APDM+EIF``.

    EIM preserves ports, the others draw them at random; hairpin is with external source, so that
    the class is also what two hosts behind the same NAT see.

    Raises:
        ModelError: the name is no class.
    """
    mapping, _, filtering = class_name.upper().partition("+")
    if mapping not in Mapping.__members__ or filtering not in Filtering.__members__:
        known = [f"{m.name}+{f.name}" for m in Mapping for f in Filtering]
        raise ModelError(f'class "{class_name}"', f"unknown; {suggest(class_name.upper(), known)}")
    preserving = mapping == Mapping.EIM.name
    assignment = PortAssignment.PRESERVE_ELSE_RANDOM if preserving else PortAssignment.RANDOM
    return NatBehavior(
        mapping=Mapping[mapping],
        filtering=Filtering[filtering],
        ports=PortAllocation(assignment=assignment),
        hairpin=Hairpin.EXTERNAL,
    )


def _load(file_name: str) -> dict[str, dict[str, object]]:
    text = (resources.files(__name__) / file_name).read_text(encoding="utf-8")
    return tomllib.loads(text)
