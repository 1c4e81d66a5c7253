"""Writes TensorBoard event files and records which files belong to a run."""
