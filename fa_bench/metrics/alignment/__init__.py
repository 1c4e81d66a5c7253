"""Metrics that compare a rule's errors and feedback with those of backpropagation."""
