"""The datasets, with one module for each source of data. The registry imports all of them."""
