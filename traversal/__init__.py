"""Underpass traversal: a peer is always reachable, by the best path there is."""
