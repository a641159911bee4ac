"""Trio shells that carry out what `traversal.paths` decides."""
