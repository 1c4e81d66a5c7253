"""Utilities that are shared by the other packages and do not depend on learning rules."""
