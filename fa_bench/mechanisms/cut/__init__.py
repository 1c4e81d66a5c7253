"""Cut rules, which cut the graph at chosen modules and deliver an error directly to each of them."""
