"""What the other packages share and nothing of which knows of learning rules."""
