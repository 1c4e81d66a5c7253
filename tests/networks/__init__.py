"""Tests of rules on published networks from other packages."""
