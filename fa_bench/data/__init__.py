"""Datasets: one file for each source of data; the registry imports them all."""
