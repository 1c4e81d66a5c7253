"""Optimizers, and the pair of them that trains weights and learned feedback."""
