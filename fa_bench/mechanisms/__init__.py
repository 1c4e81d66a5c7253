"""How rules act on a model: edge rules change the backward pass of layers, and cut rules deliver errors to cuts."""
