"""How a rule is put into a model: edge rules change a layer's own backward pass, cut rules deliver errors to cuts."""
