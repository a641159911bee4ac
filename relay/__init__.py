"""Underpass relay: a drop-in for Tailscale's derper (DERP and STUN)."""
