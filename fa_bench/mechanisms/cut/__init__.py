"""Cut rules: errors are delivered at chosen modules, and none pass between them."""
