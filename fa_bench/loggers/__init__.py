"""Loggers of a run's curves, one file each."""
