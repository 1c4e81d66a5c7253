"""Analyses that train no benchmark run: one file each, run by ``fa-bench-analyse``."""
