"""Optimizers, one file each, and the pair that trains weights and learned feedback."""
