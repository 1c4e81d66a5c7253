"""The hash of the code includes all user code that a run depends on."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from fa_bench.cli import main
from fa_bench.runs.hashes import code_hash
from fa_bench.runs.record import RESULT
from fa_bench.runs.user_code import class_parts, source_files

FILES = {
    "my_plugin.py": "import os\nimport numpy as np\nimport fa_bench.api\nimport my_helper as h\nfrom my_package import layers\n",
    "my_helper.py": "import my_plugin\nSCALE = 1\ndef f():\n    from my_lazy import x\n    return x\n",
    "my_lazy.py": "x = 1\n",
    "my_package/__init__.py": "",
    "my_package/layers.py": "from . import units\nfrom .deep.nets import Net\n",
    "my_package/units.py": "U = 1\n",
    "my_package/unused.py": "U = 1\n",
    "my_package/deep/__init__.py": "",
    "my_package/deep/nets.py": "from ..common import *\nfrom ....beyond import nothing\nclass Net: pass\n",
    "my_package/common.py": "import missing_module_of_nobody\n",
    "my_other.py": "x = 1\n",
}
USED = sorted(set(FILES) - {"my_other.py", "my_package/unused.py"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files; `my_plugin` is in `sys.modules`, as if it had been imported."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plugin = types.ModuleType("my_plugin")
    plugin.__file__ = str(tmp_path / "my_plugin.py")
    monkeypatch.setitem(sys.modules, "my_plugin", plugin)
    importlib.invalidate_caches()
    return tmp_path


def test_source_files_include_direct_and_indirect_imports(folder: Path) -> None:
    found = source_files(["my_plugin", "not_imported"])
    assert found[0] == folder / "my_plugin.py"
    assert sorted(path.relative_to(folder).as_posix() for path in found) == USED


@pytest.mark.parametrize("name", FILES)
def test_hash_covers_only_imported_files(folder: Path, name: str) -> None:
    before = code_hash(["my_plugin"])
    path = folder / name
    path.write_text(path.read_text() + "# edited\n")
    assert (code_hash(["my_plugin"]) != before) == (name in USED)
    path.write_text(FILES[name])
    assert code_hash(["my_plugin"]) == before


def test_component_file_is_hashed_without_plugin(folder: Path) -> None:
    """The hash includes the file of a rule that a script registers, and the modules that the script imports."""
    rule = type("Rule", (), {"__module__": "my_plugin"})
    assert code_hash([], [rule]) == code_hash(["my_plugin"]) != code_hash()
    before = code_hash([], [rule])
    (folder / "my_helper.py").write_text("SCALE = 2\n")
    assert code_hash([], [rule]) != before


def test_plugin_with_syntax_error_is_hashed_without_imports(folder: Path) -> None:
    (folder / "my_plugin.py").write_text("import my_helper\ndef")
    assert source_files(["my_plugin"]) == [folder / "my_plugin.py"]


def test_installed_plugin_contributes_only_own_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = folder / "site-packages"
    for name, text in {
        "its/__init__.py": "",
        "its/rules.py": "from its.parts import p\nimport another, my_helper",
        "its/parts.py": "",
        "another.py": "",
    }.items():
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(text)
    monkeypatch.syspath_prepend(str(installed))
    plugin = types.ModuleType("its.rules")
    plugin.__file__ = str(installed / "its" / "rules.py")
    monkeypatch.setitem(sys.modules, "its.rules", plugin)
    found = {path.relative_to(folder).as_posix() for path in source_files(["its.rules"])}
    assert {path for path in found if path.startswith("site-packages")} == {
        "site-packages/its/__init__.py",
        "site-packages/its/rules.py",
        "site-packages/its/parts.py",
    }
    assert "my_helper.py" in found and not any("another" in path for path in found)


NOTEBOOK = """
import functools
import math
SCALE = 2
TABLE = {"a": [1]}
def helper(x):
    return x * 2
def decorated(function):
    calls = {}
    @functools.wraps(function)
    def counting(*arguments):
        calls[arguments] = len(calls)
        return function(*arguments)
    return counting
@functools.lru_cache
def cached(x):
    return x + 20
partly = functools.partial(lambda x, y: x + y, 30)
class Base:
    def inherited(self):
        return 1
class Rule(Base):
    option = 3
    def signal(self, x):
        return [helper(y) * SCALE for y in x] + TABLE["a"] + [math.pi]
    @property
    def wide(self):
        return 4
    @staticmethod
    def plain(x={"k": 5}):
        return x
    @decorated
    def wrapped(self):
        return 6
    @functools.cached_property
    def kept(self):
        return cached(7) + partly(8)
"""


def _of_notebook(source: str, monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", module)
    exec(source, module.__dict__)
    return code_hash([], [module.__dict__["Rule"]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE = 2", "SCALE = 2.5"),
        ('{"a": [1]}', '{"a": [2]}'),
        ("return x * 2", "return x * 3"),
        ("return 1", "return 11"),
        ("option = 3", "option = 4"),
        ("return [helper", "return [-helper"),
        ("return 4", "return 5"),
        ('x={"k": 5}', 'x={"k": 6}'),
        ("return 6", "return 60"),
        ("return cached(7)", "return cached(70)"),
        ("x + 20", "x + 21"),
        ("y, 30", "y, 31"),
        ("class Rule(Base)", "class Rule"),
    ],
)
def test_notebook_classes_are_hashed_with_dependencies(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _of_notebook(NOTEBOOK, monkeypatch)
    assert old in NOTEBOOK
    assert _of_notebook(NOTEBOOK.replace(old, new), monkeypatch) != before


def test_rerunning_notebook_cell_does_not_change_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    again = "\n\n# a comment\n" + NOTEBOOK + "\nOTHER = 1\ndef unrelated():\n    return OTHER\n"
    assert _of_notebook(again, monkeypatch) == _of_notebook(NOTEBOOK, monkeypatch)


def test_self_referential_values_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = NOTEBOOK + "\nTABLE['self'] = TABLE\nTABLE['a'].append(TABLE['a'])\n"
    assert _of_notebook(source, monkeypatch) != _of_notebook(NOTEBOOK, monkeypatch)


def test_file_based_classes_have_no_notebook_parts() -> None:
    assert list(class_parts([Path, pytest.MonkeyPatch])) == []


def test_changed_plugin_import_restarts_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "plugin_with_helper.py").write_text("from helper_of_plugin import X\n")
    (tmp_path / "helper_of_plugin.py").write_text("X = 1\n")
    command = ["plugins=[plugin_with_helper]", "dataset=synthetic", "dataset.samples=40", "dataset.test_samples=8", "epochs=1"]
    hashes = []
    for x, restarted in ((1, False), (1, False), (2, True)):
        (tmp_path / "helper_of_plugin.py").write_text(f"X = {x}\n")
        assert main(command) == 0
        assert ("produced by a different version of the code; restarting" in capsys.readouterr().out) == restarted
        hashes.append(json.loads(next(tmp_path.rglob(RESULT)).read_text())["code_hash"])
    assert hashes[0] == hashes[1] != hashes[2]
    for name in ("plugin_with_helper", "helper_of_plugin"):
        sys.modules.pop(name)
