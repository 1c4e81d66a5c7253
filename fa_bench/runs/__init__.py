"""Runs: training, records, checkpoints, stopping and resuming."""
