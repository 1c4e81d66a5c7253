"""Cut rules: errors delivered at chosen modules, none passed between them."""
