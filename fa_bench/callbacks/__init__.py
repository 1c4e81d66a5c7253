"""Callbacks that plugins register and runs select by name."""
