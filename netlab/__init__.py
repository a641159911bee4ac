"""Underpass lab: any NAT, in network namespaces or in a simulated internet."""
