"""Metrics of the agreement between a rule's errors and feedback and those of backpropagation."""
