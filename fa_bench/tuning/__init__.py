"""A fair search for hyperparameters: every learning rule gets the same trials, and its best config is trained with new seeds."""
