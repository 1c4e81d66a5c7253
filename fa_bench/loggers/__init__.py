"""Loggers of a run's curves, each in its own module."""
