"""How learning rates change during training: one file a schedule."""
