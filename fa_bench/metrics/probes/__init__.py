"""Optional measurements of a trained net's layers. Each probe has its own module, and `base` defines the interface."""
