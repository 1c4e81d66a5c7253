"""Alignment metrics, most of which compare a rule's errors or feedback with those of backpropagation."""
