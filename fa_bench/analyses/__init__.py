"""Analyses that are independent of benchmark runs. Each analysis has its own module, and ``fa-bench-analyse`` runs it."""
