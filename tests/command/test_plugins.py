"""Plugins that misbehave give a one-line error that names the module or component; they never fail silently or with a
traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fa_bench.cli import main
from fa_bench.config.job import import_plugins, register_schemas
from fa_bench.errors import ConfigError
from fa_bench.registry.registries import ALGORITHMS, GROUPS, PROBES
from fa_bench.utils.stopping import Interrupted

SMALL = ["dataset=synthetic", "dataset.samples=64", "dataset.test_samples=16", "architecture.widths=[8]", "epochs=1"]

IMPORTS = """\
import dataclasses
from fa_bench.registry.options import option
from fa_bench.registry.registries import ALGORITHMS, ARCHITECTURES, DATASETS, OPTIMIZERS, PROBES
from fa_bench.mechanisms.edge.rule import EdgeRule
"""
RULE = "@ALGORITHMS.register('odd_rule')\n@dataclasses.dataclass(eq=False)\nclass Odd(EdgeRule):\n    'A rule.'\n"

#: Maps the name of a case to the module's source and to what the message must contain.
BROKEN = {
    "exit 0": ("import sys\nsys.exit(0)\n", ["odd_plugin", "SystemExit", "odd_plugin.py:2"]),
    "exit with a message": ("raise SystemExit('bye')\n", ["odd_plugin", "SystemExit: bye", "odd_plugin.py:1"]),
    "keyboard interrupt": ("raise KeyboardInterrupt\n", ["odd_plugin", "KeyboardInterrupt"]),
    "generator exit": ("raise GeneratorExit\n", ["odd_plugin", "GeneratorExit"]),
    "a BaseException": ("class Mine(BaseException): pass\nraise Mine('x' * 50000)\n", ["odd_plugin", "Mine: xxx", "plugin.py:2"]),
    "a long error": ("raise ValueError('y' * 100000)\n", ["odd_plugin", "ValueError: yyy", "odd_plugin.py:1"]),
    "an error that cannot be shown": (
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute\n",
        ["odd_plugin", "Mute", "plugin.py:3"],
    ),
    "no class at all": (IMPORTS + "ALGORITHMS.register('odd_rule')(3)\n", ["'odd_rule'", "3 is not a subclass", "Rule"]),
    "a function": (IMPORTS + "@ALGORITHMS.register('odd_rule')\ndef rule(): pass\n", ["'odd_rule'", "not a subclass", "Rule"]),
    "a class that is not a rule": (IMPORTS + "class A: pass\nALGORITHMS.register('odd_rule')(A)\n", ["'odd_rule'", "Rule", ":6"]),
    "no architecture": (IMPORTS + RULE.replace("ALGORITHMS", "ARCHITECTURES"), ["architecture", "'odd_rule'", "Architecture"]),
    "no dataset": (IMPORTS + "@DATASETS.register('odd_rule')\nclass A: pass\n", ["dataset", "'odd_rule'", "Dataset"]),
    "no optimizer": (IMPORTS + "@OPTIMIZERS.register('odd_rule')\nclass A: pass\n", ["optimizer", "OptimizerOptions"]),
    "no probe": (IMPORTS + "@PROBES.register('odd_rule')\nclass A: pass\n", ["probe", "'odd_rule'", "Probe"]),
    "no name": (IMPORTS + RULE.replace("'odd_rule'", "''"), ["algorithm", "''", "letters"]),
    "a name that is a path": (IMPORTS + RULE.replace("odd_rule", "../x y"), ["'../x y'", "letters"]),
    "a name that is not text": (IMPORTS + RULE.replace("'odd_rule'", "3"), ["algorithm", "as 3", "letters"]),
    "no call": (IMPORTS + RULE.replace("('odd_rule')", ""), ["algorithm", "register('NAME')"]),
    "an option without default": (
        IMPORTS + RULE.replace("eq=False", "eq=False, kw_only=True") + "    y: int\n",
        ["algorithm=odd_rule", "no usable"],
    ),
    "a default out of range": (IMPORTS + RULE + "    y: int = option(0, 'y', minimum=1)\n", ["algorithm=odd_rule", "y=0"]),
    "a type that does not exist": (IMPORTS + RULE + "    y: 'Foo' = option(1, 'y')\n", ["algorithm=odd_rule", "Foo"]),
    "a default that is not data": (IMPORTS + RULE + "    y: object = option(object(), 'y')\n", ["algorithm=odd_rule", "object"]),
    "a check that fails": (IMPORTS + RULE + "    def check(self): raise ValueError('c' * 20000)\n", ["ValueError: ccc"]),
    "a check that exits": (IMPORTS + RULE + "    def check(self): raise SystemExit(0)\n", ["odd_rule", "SystemExit"]),
}


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("odd_plugin", None)
    for registry in (*GROUPS, PROBES):
        if "odd_rule" in registry:
            registry.drop("odd_rule")
    register_schemas()


@pytest.mark.parametrize("words", [["-m", "seed=0,1"], ["--help"]], ids=["grid", "help"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_gives_single_line_error(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, named = BROKEN[name]
    (tmp_path / "odd_plugin.py").write_text(text)
    assert main([*words, *SMALL, "plugins=[odd_plugin]"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 2000
    for part in named:
        assert part in said
    assert [path.name for path in tmp_path.iterdir()] == ["odd_plugin.py"]


def test_repeated_import_reports_same_error(tmp_path: Path) -> None:
    (tmp_path / "odd_plugin.py").write_text(IMPORTS + RULE + "    y: int = option(0, 'y', minimum=1)\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="algorithm=odd_rule"):
            import_plugins(["odd_plugin"])
        assert "odd_rule" not in ALGORITHMS
        import_plugins([])  # a command without the plugin still works


def test_signal_during_plugin_import_is_interrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd_plugin.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    assert main([*SMALL, "plugins=[odd_plugin]"]) == 143
    (tmp_path / "odd_plugin.py").write_text("from fa_bench.utils.stopping import Interrupted\nraise Interrupted(2)\n")
    with pytest.raises(Interrupted):
        import_plugins(["odd_plugin"])


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("error", ["SystemExit", "GeneratorExit"])
@pytest.mark.parametrize("where", ["pathway(self, layer)", "check(self)"])
def test_rule_calling_exit_does_not_affect_other_jobs(
    where: str, error: str, grid: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The default of the option is valid; the value in the YAML file makes the rule exit.
    body = f"    y: int = option(0, 'y')\n    def {where}:\n        if self.y: raise {error}(0)\n        return None\n"
    (tmp_path / "odd_plugin.py").write_text(IMPORTS + RULE + body)
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "odd.yaml").write_text("defaults:\n  - /_schema/algorithm/odd_rule@_here_\ny: 1\n")
    choice = "algorithm=odd,fa" if grid else "algorithm=odd"
    code = main([*(["-m"] if grid else []), "--config-dir", "conf", *SMALL, "plugins=[odd_plugin]", choice])
    said = capsys.readouterr()
    assert error in said.err and "Traceback" not in said.err
    if where == "check(self)":
        assert code == 2 and "algorithm=odd_rule" in said.err
    else:
        assert code == 1
        assert len(list(tmp_path.rglob("result.json"))) == 1 + grid


OPTIMIZER = """
import torch
from fa_bench.optim.base import OptimizerOptions
@OPTIMIZERS.register('odd_rule')
@dataclasses.dataclass(eq=False)
class Plain(OptimizerOptions):
    'Plain descent.'
    def build(self, groups): return torch.optim.SGD(groups, lr=self.lr)
"""


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_registered_components_are_selectable_without_config_file(launcher: str, tmp_path: Path) -> None:
    rule = "from fa_bench.rules.fa import FA\n" + RULE.replace("EdgeRule", "FA")
    (tmp_path / "odd_plugin.py").write_text(IMPORTS + rule + OPTIMIZER)
    words = [
        "-m",
        *SMALL,
        "plugins=[odd_plugin]",
        "algorithm=odd_rule,kp",
        "algorithm.plain_last=true",
        "optimizer@feedback_optimizer=odd_rule",
        "feedback_optimizer.lr=0.5",
        f"hydra/launcher={launcher}",
    ]
    assert main([*words, *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]) == 0
    for path in (found := list(tmp_path.rglob("config.yaml"))):
        config = yaml.safe_load(path.read_text())
        assert config["feedback_optimizer"]["name"] == "odd_rule" and config["feedback_optimizer"]["lr"] == 0.5
    assert len(found) == 2


def test_user_config_file_replaces_component_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's file replaces the component's config; Hydra 1.3 would add the component's own defaults."""
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "thin.yaml").write_text("defaults:\n  - fa\ndensity: 0.25\n")
    (tmp_path / "conf" / "algorithm" / "kp.yaml").write_text("defaults:\n  - thin\n")
    assert main(["--config-dir", "conf", "algorithm=kp", "--cfg", "job", "--package", "algorithm"]) == 0
    said = capsys.readouterr()
    assert "name: fa" in said.out and "density: 0.25" in said.out and "b_lr_scale" not in said.out and said.err == ""


def test_dropped_component_is_not_selectable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd_plugin.py").write_text(IMPORTS + RULE)
    assert main(["--cfg", "job", "plugins=[odd_plugin]", "algorithm=odd_rule"]) == 0
    ALGORITHMS.drop("odd_rule")
    assert main(["--cfg", "job", "algorithm=odd_rule"]) == 2 and "no such algorithm" in capsys.readouterr().err


@pytest.mark.parametrize("error", ["SystemExit", "GeneratorExit"])
def test_dry_run_reports_plugin_exit(error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd_plugin.py").write_text(IMPORTS + RULE + f"    def pathway(self, layer): raise {error}(0)\n")
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "odd.yaml").write_text("defaults:\n  - /_schema/algorithm/odd_rule@_here_\n")
    assert main(["--dry-run", "--config-dir", "conf", *SMALL, "plugins=[odd_plugin]", "algorithm=odd"]) == 1
    assert error in (said := capsys.readouterr().err) and "odd_plugin.py:9" in said and "Traceback" not in said


def test_plugin_cannot_replace_component_of_same_name_and_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = ALGORITHMS["fa"]
    text = IMPORTS + RULE.replace("odd_rule", "fa").replace("class Odd", "class FA")
    assert "class FA(" in text
    (tmp_path / "odd_plugin.py").write_text(text)
    assert main([*SMALL, "plugins=[odd_plugin]"]) == 2
    assert "algorithm 'fa' is registered twice: fa_bench.rules.fa and odd_plugin" in capsys.readouterr().err
    assert ALGORITHMS["fa"] is before
