"""The datasets, with one module for each source of data; the registry imports all modules."""
