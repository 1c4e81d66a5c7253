"""Modules with several weights, such as attention: compositions of linear layers while a rule is attached."""
