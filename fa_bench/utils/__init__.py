"""Utilities shared by the other packages; they know nothing of learning rules."""
