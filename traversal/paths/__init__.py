"""Decisions: pure state machines, (event, now) in and effects out; they never await."""
