"""Datasets: one file for each source of images; the registry imports them all."""
