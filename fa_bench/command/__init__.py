"""The command line ``fa-bench``."""
