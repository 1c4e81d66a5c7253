"""What networks are trained to do: one file an objective."""
