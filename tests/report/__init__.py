"""Tests of reports on hand-made run directories."""
