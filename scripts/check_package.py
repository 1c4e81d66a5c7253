"""Builds the package, checks it, and runs the wheel's commands in an empty folder.

    python scripts/check_package.py [--out DIR]

The script builds the sdist and the wheel in the current environment without network access, checks them with twine, and installs
the wheel without its dependencies into a temporary folder. In an empty folder, the script then performs a single run, a sweep, a
report, a tuning study and an analysis with the installed code. The extras `package` and `tune` are required. With `--out`, the
script keeps the built files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Commands that a new user would run, each with a file that it must write, if any.
COMMANDS: list[tuple[list[str], str | None]] = [
    (["fa-bench", "--version"], None),
    (["fa-bench", "algorithm=kp", "epochs=1"], "outputs/digits-mlp/kp-*/seed0/result.json"),
    (["fa-bench", "-m", "algorithm=bp,kp", "scale=smoke", "experiment=quickstart"], "outputs/quickstart/report.md"),
    (["fa-bench-report", "outputs/quickstart", "--out", "again"], "again/report.csv"),
    (["fa-bench-tune", "algorithm=bp", "budget=2", "epochs=1", "final_epochs=1", "seeds=0"], "outputs/digits-mlp-tune/tune.md"),
    (["fa-bench-analyse", "memory_accesses"], "outputs/**/memory_accesses*"),
]
#: Files and folders that must be in the wheel, in addition to the code of fa_bench.
IN_WHEEL = ["fa_bench/conf/config.yaml", "fa_bench/py.typed", "fa_bench/report/published.yaml", "hydra_plugins/"]
#: Files and folders that must be in the sdist, so that packagers can build and test from it.
IN_SDIST = ["conf/config.yaml", "tests/", "scripts/", "docs/", "CITATION.cff", "CHANGELOG.md", "LICENSE", "pyproject.toml"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for the built sdist and wheel")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fa_bench-package-") as name:
        folder = Path(name)
        sdist, wheel = build(folder / "dist")
        installed = folder / "installed"
        _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", installed, wheel], ROOT)
        use(installed, folder / "empty")
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy(path, arguments.out)
    print("package: ok")


def build(dist: Path) -> tuple[Path, Path]:
    """Build the sdist, build the wheel from it, and check the metadata and contents of both.

    Raises:
        SystemExit: if a required file or folder is missing from the sdist or the wheel.
        CalledProcessError: if the build fails or twine finds an error.
    """
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT], ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    _run([sys.executable, "-m", "twine", "check", "--strict", sdist, wheel], ROOT)
    with tarfile.open(sdist) as archive:
        _require(sdist.name, IN_SDIST, [name.partition("/")[2] for name in archive.getnames()])
    with zipfile.ZipFile(wheel) as archive:
        _require(wheel.name, IN_WHEEL, archive.namelist())
    return sdist, wheel


def use(installed: Path, empty: Path) -> None:
    """Run the commands in an empty folder with the code in `installed`, and check that they write the expected files.

    Raises:
        SystemExit: if other code is imported, or a command is missing or does not write its file.
        CalledProcessError: if a command fails.
    """
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "import fa_bench; print(fa_bench.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=empty, env=environment, text=True, capture_output=True, check=True)
    if not Path(found.stdout.strip()).is_relative_to(installed):
        raise SystemExit(f"package: imported {found.stdout.strip()} instead of the installed wheel")
    for (name, *arguments), expected in COMMANDS:
        script = shutil.which(name, path=installed / "bin") or shutil.which(name, path=installed / "Scripts")
        if script is None:
            raise SystemExit(f"package: the wheel has no command {name}")
        _run([script, *arguments], empty, environment)
        if expected is not None and not list(empty.glob(expected)):
            raise SystemExit(f"package: {name} {' '.join(arguments)} wrote no {expected}")


def _require(archive: str, wanted: list[str], names: list[str]) -> None:
    missing = [name for name in wanted if not any(found.startswith(name) for found in names)]
    if missing:
        raise SystemExit(f"package: {archive} lacks {', '.join(missing)}")


def _run(command: list[str | Path], folder: Path, environment: dict[str, str] | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
