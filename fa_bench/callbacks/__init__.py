"""Callbacks that a run can be given by name; plugins register theirs."""
