"""Runs: how they train, are recorded, save checkpoints, stop and resume."""
