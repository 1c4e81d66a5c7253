"""The files with which the project is published agree with the code and with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fa_bench
from fa_bench.registry.registries import ALGORITHMS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
#: Rules without a paper of their own, which are references and floors.
WITHOUT_PAPER = {"bp", "frozen", "frozen_blocks"}


def _workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))


def test_versions_agree():
    assert CITATION["version"] == fa_bench.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == fa_bench.__version__


def test_citation_file_cites_paper_of_every_rule():
    cited = {rule for reference in CITATION["references"] for rule in reference["notes"].removeprefix("Rules: ").split(", ")}
    assert cited == set(ALGORITHMS) - WITHOUT_PAPER


def test_readme_and_citation_file_cite_same_papers():
    cited: dict[str, set[tuple[str, int]]] = {}
    for reference in CITATION["references"]:
        first = reference["authors"][0]
        for rule in reference["notes"].removeprefix("Rules: ").split(", "):
            cited.setdefault(rule, set()).add((first.get("family-names", first.get("name")), reference["year"]))
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {rule: set(re.findall(r"([A-Z]\w+(?: and \w+| authors| et al\.)?) (\d{4})", source)) for rule, source in rows}
    papers = {rule: {(re.split(r" and | et al", names)[0], int(year)) for names, year in found} for rule, found in named.items()}
    assert {rule: found - cited.get(rule, set()) for rule, found in papers.items() if found - cited.get(rule, set())} == {}


def test_python_versions_agree():
    prefix = "Programming Language :: Python :: 3."
    declared = [
        name.removeprefix("Programming Language :: Python :: ") for name in PROJECT["classifiers"] if name.startswith(prefix)
    ]
    lowest, above = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert declared == [f"3.{minor}" for minor in range(int(lowest), int(above))]
    assert _workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["python"] == declared
    assert _workflow("tests")["jobs"]["package"]["strategy"]["matrix"]["python"] == [declared[0], declared[-1]]


@pytest.mark.parametrize("name", ["tests", "release", "docs"])
def test_workflows_have_minimal_permissions(name: str):
    workflow = _workflow(name)
    assert workflow["permissions"] == {"contents": "read"}
    for job, settings in workflow["jobs"].items():
        assert set(settings.get("permissions", {})) <= ({"id-token", "pages"} if job in ("publish", "deploy") else set())


def test_docs_workflow_publishes_mkdocs_site_dir():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (folder,) = re.findall(r"^site_dir: (.+)$", text, re.MULTILINE)
    (uploaded,) = [
        step["with"]["path"] for step in _workflow("docs")["jobs"]["build"]["steps"] if "upload-pages" in step.get("uses", "")
    ]
    assert uploaded == folder


def test_extras_installed_by_workflows_exist():
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        for extras in re.findall(r'\.\[([\w,]+)\]"', path.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), path.name


def test_pre_commit_and_lint_extra_pin_same_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (revision,) = [repo["rev"] for repo in hooks if "ruff" in repo["repo"]]
    assert f"ruff=={revision.removeprefix('v')}" in PROJECT["optional-dependencies"]["lint"]
