"""Tests of `fa_bench.mechanisms`."""
