"""Optimizers, and the pair of optimizers that trains weights and learned feedback."""
