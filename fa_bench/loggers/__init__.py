"""Where a run's curves go, beside its own records: one file a logger."""
