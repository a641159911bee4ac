"""Back end 1: an internet in memory for unmodified Trio programs, with a virtual clock."""

from netlab.simulated.host import SimulatedHost, current_host
from netlab.simulated.internet import SimulatedInternet
from netlab.simulated.network import NatNode

__all__ = ["NatNode", "SimulatedHost", "SimulatedInternet", "current_host"]
