"""From YAML to a checked job: options declared once, tables of components, and what a job is called."""
