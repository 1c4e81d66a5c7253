"""Analyses that do not train benchmark runs, one file each; ``fa-bench-analyse`` runs them."""
