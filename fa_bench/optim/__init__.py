"""Optimizers, and the class that trains weights and learned feedback with one or several of them."""
