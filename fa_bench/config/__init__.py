"""From YAML to a checked job, its identity and its label."""
