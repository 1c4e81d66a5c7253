"""Turn a YAML config into a checked job with an identity and a label."""
