"""Training objectives, each in its own file."""
