"""Tests of the layer operations."""
