"""Tests of reports over hand-made run directories."""
