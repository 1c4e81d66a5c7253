"""A fair hyperparameter search: every learning rule gets the same number of trials, and its best config is trained with new
seeds."""
