"""Utilities shared by the other packages; they do not depend on learning rules."""
