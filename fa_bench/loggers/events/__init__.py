"""TensorBoard event files: the writer, and the record of a run's files."""
