"""Installed distributions can offer plugins as entry points; their components are available without naming the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULE = '''"""A plugin."""
import dataclasses
import fa_bench
from fa_bench.rules.fa import FA

@fa_bench.register_rule("offered")
@dataclasses.dataclass(eq=False)
class Offered(FA):
    """A rule that a distribution offers."""
'''
SMALL = [
    "algorithm=offered",
    "dataset=synthetic",
    "dataset.samples=64",
    "dataset.test_samples=16",
    "architecture.widths=[8]",
    "epochs=1",
    "batch_size=16",
    "device=cpu",
]


def distribution(folder: Path, text: str) -> Path:
    """Install a distribution that offers a module with this source, and return its folder."""
    info = folder / "offering-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fa_bench.plugins]\noffering = offering_rules\n")
    (folder / "offering_rules.py").write_text(text)
    return folder


def run(folder: Path, site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_installed_plugin_components_need_no_plugins_option(tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", RULE)
    listed = run(tmp_path, site, "-m", "fa_bench", "--help", "algorithm")
    assert "offered" in listed.stdout, listed.stderr
    first = run(tmp_path, site, "-m", "fa_bench", *SMALL, "output_dir=out")
    assert first.returncode == 0, first.stderr
    code = "import fa_bench, torch; model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in '12'])"
    attached = run(tmp_path, site, "-c", f"{code}; print(fa_bench.attach(model, 'offered').name)")
    assert attached.stdout == "offered\n", attached.stderr

    # The plugin's source is part of the code that determines a run's results.
    (site / "offering_rules.py").write_text(RULE + "\n# another version\n")
    second = run(tmp_path, site, "-m", "fa_bench", *SMALL, "output_dir=out", "resume=true")
    assert second.returncode == 2
    assert "different" in second.stderr, second.stderr


def test_broken_installed_plugin_is_reported(tmp_path: Path) -> None:
    site = distribution(tmp_path / "site", "raise SystemExit(0)\n")
    for command in (["-m", "fa_bench", *SMALL], ["-m", "fa_bench", "--help", "algorithm"]):
        ran = run(tmp_path, site, *command)
        assert ran.returncode == 2
        assert "offering_rules" in ran.stderr and "distribution offering" in ran.stderr, ran.stderr
        assert "offering_rules.py:1" in ran.stderr and "Traceback" not in ran.stderr
