"""How well a rule's errors and feedback agree with those of backpropagation."""
