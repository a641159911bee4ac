"""Bytes and messages, one module per protocol; pure: no clock, no socket, no randomness."""
