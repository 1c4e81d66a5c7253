"""Modules with several weights, such as attention, which are expanded into compositions of linear layers while a rule is
attached."""
