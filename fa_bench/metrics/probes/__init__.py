"""Optional measurements of a trained net's layers: one file a probe; `base` defines what a probe is."""
