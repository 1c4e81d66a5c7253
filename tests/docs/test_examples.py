"""The examples in the docstrings of the public names work."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import fa_bench
from fa_bench.metrics.meter import AlignmentMeter

#: The public objects by name. The decorators, whose names begin with register_, share the example of register_rule.
PUBLIC = {name: getattr(fa_bench, name) for name in fa_bench.__all__ if name != "__version__"} | {
    "AlignmentMeter": AlignmentMeter
}
SHARED = "register_rule"


def test_every_public_name_has_an_example() -> None:
    assert [name for name, value in PUBLIC.items() if ">>>" not in (value.__doc__ or "")] == []


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.startswith("register_") or name == SHARED])
def test_docstring_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: None) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    output: list[str] = []
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert tried and not failed, "".join(output)
