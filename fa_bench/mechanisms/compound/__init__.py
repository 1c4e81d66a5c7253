"""Attention, recurrent and bilinear modules, which are expanded into compositions of linear layers while a rule is attached."""
