"""TensorBoard event files: the writer, and the record of the files that a run has made."""
