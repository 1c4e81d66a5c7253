"""Every Python block on the pages runs, and every shell command is valid; `NOT_RUN` lists exceptions with their reasons."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import fa_bench
import fa_bench.report
from fa_bench.analyses.cli import _parsed
from fa_bench.cli import main
from fa_bench.command.compose import Composer
from fa_bench.config.job import register_schemas
from fa_bench.registry.registries import ALGORITHMS, ANALYSES
from fa_bench.report import cli as report
from fa_bench.report import mean_curves
from fa_bench.tuning import cli as tuning
from fa_bench.tuning.tune import prepared

from .pages import DOCS, PAGES, ROOT, commands, fences, indented, name_of

#: Maps a page and the beginning of a block or line to the reason why it is not run here.
NOT_RUN = {
    ("README.md", "python3 -m venv"): "installs packages; .ci/run runs the second of these lines",
    ("README.md", "import fa_bench\n\nruns"): "test_docs.py runs it and checks the results",
    ("docs/command_line.md", "tensorboard"): "starts a server",
    ("docs/tensorboard.md", "tensorboard"): "starts a server",
    ("docs/add_a_dataset.md", "fa-bench"): "test_doc_pages.py runs all lines of this page",
    ("docs/add_a_dataset.md", '"""Images'): "test_doc_pages.py runs it",
    ("docs/add_a_dataset.md", "import pathlib"): "test_doc_pages.py runs it",
    ("docs/analyses.md", "fa-bench-analyse NAME"): "NAME and OPTION are placeholders",
    ("docs/cluster.md", "export"): "sets a variable of the shell",
    ("docs/cluster.md", "pip install hydra-ray-launcher"): "not an extra of this package",
    ("docs/cluster.md", "#!/bin/bash"): "test_doc_pages.py runs it",
    ("docs/extend.md", "from fa_bench.runs.train"): "needs a job; tests/runs/test_stopping.py passes callbacks in this way",
    ("docs/sweeps.md", "fa-bench -m plugins=[my_rules]"): "needs the rule of add_a_rule.md",
    ("docs/tune.md", "fa-bench-tune"): "tests/tuning/test_plan.py checks all lines of this page",
}
#: Maps a page to code that is executed before the page's Python blocks, which use its outputs.
BEFORE = {
    "docs/extend.md": 'import fa_bench; fa_bench.run("optimizer.lr=0.1,0.01")',
    "docs/read_the_metrics.md": 'import fa_bench; fa_bench.run("algorithm=bp,fa")',
    "docs/reports.md": 'import fa_bench; fa_bench.run("algorithm=bp,fa", "optimizer.lr=0.1,0.01")',
    "docs/tune.md": 'import fa_bench; fa_bench.tune("experiment=tune_digits")',
}
#: Maps a page to the files that its commands read, as {path: text, or language of the block that contains the text}.
FILES = {
    "docs/add_a_rule.md": {"myconf/algorithm/sparse.yaml": "yaml"},
    "docs/datasets.md": {
        "houses.csv": "area,price\n" + "".join(f"{row},{row}.5\n" for row in range(20)),
        "plants.csv": "height,species\n" + "".join(f"{row},{row % 3}\n" for row in range(30)),
    },
}
#: Pages with Python blocks that write files for the page's commands.
PREPARES = ("docs/datasets.md",)
#: Options that reduce the runs and studies on the pages to the smallest scale.
SMALL_RUN = {"scale": "smoke", "threads": 1, "loggers": [[]], "seed": [0]}
SMALL_STUDY = {"scale": "smoke", "threads": 1, "algorithm": ["bp", "fa"], "budget": 1, "seeds": [0]}
LANGUAGES = {"python", "bash", "yaml", "toml", "math"}


def reason(page: Path, text: str) -> str | None:
    """Return the reason why a block or line is not run, or None if it is run."""
    return next((why for (name, start), why in NOT_RUN.items() if name == name_of(page) and text.startswith(start)), None)


def test_bash_blocks_have_reason_not_to_run() -> None:
    """Bash fences are not run here, so each needs a reason in `NOT_RUN`."""
    scripts = [(page, block.code) for page in PAGES for block in fences(page) if block.language == "bash"]
    assert [code for page, code in scripts if reason(page, code) is None] == []


def python_of(page: Path) -> list[str]:
    return [block.code for block in fences(page) if block.language == "python" and reason(page, block.code) is None]


def shrunk(function: Callable[..., Any], small: dict[str, Any]) -> Callable[..., Any]:
    """Wrap `fa_bench.run` or `tune` so that the options in `small` replace those of the call."""

    def call(*overrides: str, **options: Any) -> Any:
        given = (each for each in overrides if each.partition("=")[0] not in small)
        return function(*given, **{**options, **small})

    return call


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: None) -> None:
    """The Python blocks of a page run in order, in one module."""
    monkeypatch.chdir(tmp_path)
    for name, small in (("run", SMALL_RUN), ("tune", SMALL_STUDY)):
        monkeypatch.setattr(fa_bench, name, shrunk(getattr(fa_bench, name), small))
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code in (BEFORE.get(name_of(page), ""), *python_of(page)):
        exec(compile(code, name_of(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: None) -> None:
    """Configs are composed and checked, and arguments are parsed, in the same way as when the command starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for path, text in FILES.get(name_of(page), {}).items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(next((block.code for block in fences(page) if block.language == text), text))
    for code in python_of(page) if name_of(page) in PREPARES else ():
        exec(compile(code, name_of(page), "exec"), {})
    for line in commands(page):
        if reason(page, line) is None:
            program, *words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "3"))
            for plugin in re.findall(r"plugins=\[(\w+)\]", line):
                monkeypatch.delitem(sys.modules, plugin, raising=False)
                Path(f"{plugin}.py").write_text("\n".join(code for code in python_of(page) if "@fa_bench.register" in code))
            CHECKS[program](words, monkeypatch)


def check_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose and check the first job, and further jobs until every value in the command occurs in one of them.

    A command with --help is run instead. Launcher options are ignored, because they have their own tests.
    """
    if "--help" in words:
        assert main(words) == 0
        return
    folder = words[words.index("--config-dir") + 1] if "--config-dir" in words else None
    overrides = [word for word in words if word != folder and not word.startswith(("-", "hydra/launcher", "hydra.launcher"))]
    register_schemas()
    composer = Composer("config", folder, overrides)
    first, *others = composer.expand(multirun="-m" in words)
    keys = [override.partition("=")[::2] for override in overrides]
    unseen = {f"{key}={value}" for key, values in keys for value in values.split(",")} - set(first)
    jobs = [first]
    for job in others:
        if not unseen.isdisjoint(job):
            unseen -= set(job)
            jobs.append(job)
    assert composer.check(jobs)


def check_processes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert words[0].startswith("--nproc-per-node=") and words[1:3] == ["-m", "fa_bench"]
    check_run(words[3:], monkeypatch)


def check_report(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arguments with stub results in the run folders; no report is written."""
    folders = [word for word in words if word.startswith("outputs")]
    for folder in folders:
        for name in ("bp", "kp"):
            run = Path(folder, f"{name}-0a", "seed0")
            run.mkdir(parents=True, exist_ok=True)
            result = {"status": "finished", "label": name, "group": f"{name}-0a", "algorithm": name, "seed": 0}
            (run / "result.json").write_text(json.dumps(result))
    written = SimpleNamespace(text="", markdown=Path("report.md"), figure=Path("report.png"), complete=True)
    monkeypatch.setattr(fa_bench.report, "write_report", lambda *arguments, **options: written)
    monkeypatch.setattr(mean_curves, "write_mean_curves", lambda *arguments: [])
    assert folders and report.main(words) == 0


def check_tune(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make and check the plan of the study. A command with --dry-run is run, and reads the data."""
    if "--dry-run" in words:
        assert tuning.main(words) == 0
    else:
        assert prepared(words, None).rules


def check_analysis(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words:
        name, *options = words
        assert ANALYSES[name].from_mapping(OmegaConf.to_container(_parsed(options)))  # type: ignore[arg-type]


class Parsed(Exception):
    """Raised when the arguments have been accepted."""


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the script exists, and that its parser, if it has one, accepts the arguments."""
    path, parse = ROOT / words[0], argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise Parsed

    if "ArgumentParser" not in path.read_text(encoding="utf-8"):
        assert not words[1:]
        return
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        patch.setattr(sys, "argv", words)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        with pytest.raises(Parsed):
            script.main()


def check_installation(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the extras named in the command exist."""
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    wanted = re.fullmatch(r"install -e \.\[([\w,]+)\]", " ".join(words))
    assert wanted is not None and set(wanted[1].split(",")) <= set(re.findall(r"^(\w+) = ", section, re.M))


CHECKS = {
    "fa-bench": check_run,
    "torchrun": check_processes,
    "fa-bench-report": check_report,
    "fa-bench-tune": check_tune,
    "fa-bench-analyse": check_analysis,
    "python": check_script,
    "pip": check_installation,
}


def test_rule_pages_contain_attach_line() -> None:
    """The lines are not run, because test_doc_pages.py attaches every rule."""
    for name in ALGORITHMS:
        assert f'rule = fa_bench.attach(model, "{name}")' in indented(DOCS / "rules" / f"{name}.md")


def test_fence_languages_are_known() -> None:
    assert {block.language for page in PAGES for block in fences(page)} <= LANGUAGES


def test_not_run_reasons_refer_to_existing_blocks() -> None:
    texts = {name_of(page): [*commands(page), *(block.code for block in fences(page))] for page in PAGES}
    assert [key for key in NOT_RUN if not any(text.startswith(key[1]) for text in texts[key[0]])] == []
