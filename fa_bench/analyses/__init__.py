"""Analyses that train no benchmark run: one file each, run by ``scripts/analyse.py``."""
