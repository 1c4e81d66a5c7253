"""Training objectives, with one file for each."""
