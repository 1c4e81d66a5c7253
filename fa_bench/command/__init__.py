"""The command line behind ``fa-bench``: compose, refuse, explain, and say what would be run."""
