"""Tests of reports, mostly on hand-made run directories."""
