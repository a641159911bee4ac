"""Choosing a back end, and moving this very command into a jail where the kernel's is chosen."""

from __future__ import annotations

import sys
from enum import StrEnum

from netlab.kernel.capabilities import Capability, examine
from netlab.kernel.jail import in_jail, run_in_jail
from netlab.labs import BackEnd

# Without these the kernel back end builds nothing of use.
_NEEDED = ("jail", "veth", "sysctl", "nftables", "conntrack", "tun")


class Wish(StrEnum):
    """What the user asks for."""

    SIMULATED = "simulated"
    KERNEL = "kernel"
    ANY = "any"


class BackEndError(Exception):
    """The back end that was asked for, or that the programs need, isn't possible here."""


def kernel_shortcomings() -> list[Capability]:
    """Return what this machine lacks for the kernel back end; nothing means that it works."""
    return [found for found in examine() if found.name in _NEEDED and not found.available]


def explain_shortcomings(missing: list[Capability]) -> str:
    """Return why the kernel back end is not possible, with remedies."""
    return "; ".join(f"{found.name}: {found.why}" for found in missing)


def choose_back_end(wish: Wish, *, needs_kernel: bool = False) -> BackEnd:
    """Return the back end to use.

    Raises:
        BackEndError: the kernel's is wanted or needed and isn't possible here.
    """
    if needs_kernel and wish is Wish.SIMULATED:
        raise BackEndError(
            "command lines run on the kernel back end only; leave --backend out, or use "
            'Trio functions (python = "module:function")'
        )
    if wish is Wish.SIMULATED:
        return BackEnd.SIMULATED
    if in_jail():
        return BackEnd.KERNEL
    missing = kernel_shortcomings()
    if not missing:
        return BackEnd.KERNEL
    if needs_kernel or wish is Wish.KERNEL:
        raise BackEndError(f"no kernel back end here: {explain_shortcomings(missing)}")
    return BackEnd.SIMULATED


def enter_jail() -> None:
    """Run this command again inside a jail, unless it already does."""
    if not in_jail():
        run_in_jail([sys.executable, *sys.orig_argv[1:]])
