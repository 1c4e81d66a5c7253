"""Optional measurements of a trained net's layers: one file per probe; `base` defines the interface."""
