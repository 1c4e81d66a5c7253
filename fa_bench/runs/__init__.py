"""One run, from its first batch to its last file: train, record, checkpoint, stop and go on."""
