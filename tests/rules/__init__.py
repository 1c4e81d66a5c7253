"""Tests of the learning rules against independent references."""
