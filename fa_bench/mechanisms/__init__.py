"""The mechanisms by which rules act on a model. Edge rules change the backward pass of layers, and cut rules deliver errors to
cuts."""
