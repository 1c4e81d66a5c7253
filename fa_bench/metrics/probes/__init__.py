"""Probes of a trained net's layers that a run may ask for, one a file; `base` says what a probe is."""
