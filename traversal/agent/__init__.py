"""The node agent: a long-running node with a peers file, a control socket, a WireGuard bridge."""
