"""A fixture for tests that run the examples in the documentation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fa_bench.registry import registries
from fa_bench.registry.registry import Registry


@pytest.fixture
def registered() -> Iterator[None]:
    """Remove newly registered components after the test."""
    tables = {name: table for name, table in vars(registries).items() if isinstance(table, Registry)}
    known = {name: set(table) for name, table in tables.items()}
    yield
    for name, table in tables.items():
        for entry in set(table) - known[name]:
            table.drop(entry)
