"""Compares two versions of the code by the hashes and metrics of short deterministic runs of every rule and experiment.

    python scripts/compare_runs.py record before.json [--data-dir DIR] [--rules-only]
    python scripts/compare_runs.py compare before.json after.json

`record` trains every rule on an MLP (with SGD and with Adam), a small convolutional net and a narrow ResNet-20. Unless
``--rules-only`` is given, it also runs every experiment at ``scale=smoke`` with seed 0. All runs use the version of fa_bench that
Python imports. Runs whose dataset is not in DIR and cannot be downloaded are recorded as failed. `compare` prints every run that
differs or that is in only one of the files. Its exit code is 1 if there are such runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from fa_bench.cli import main as fa_bench
from fa_bench.config.job import conf_dir
from fa_bench.registry.registries import ALGORITHMS

SETTINGS = {
    "mlp sgd": ["architecture=mlp", "dataset=digits", "optimizer=sgd", "optimizer.weight_decay=0.001"],
    "mlp adam": ["architecture=mlp", "dataset=digits", "optimizer=adam", "optimizer.weight_decay=0.001"],
    "conv2": ["architecture=conv2", "dataset=digits"],
    "resnet20": ["architecture=resnet20", "architecture.width=4", "dataset=synthetic"],
}
COMMON = ["scale=smoke", "deterministic=true", "threads=1"]
HASHES = ("status", "initial_weights_hash", "batches_hash", "weights_hash", "feedback_hash", "optimizer_hash")


def record(data_dir: str, rules_only: bool) -> dict[str, Any]:
    """The status, hashes and metrics of every run by name, or the reason why a run has none."""
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for setting, overrides in SETTINGS.items():
            for rule in ALGORITHMS:  # in separate runs, because some rules do not support every net
                out = Path(scratch, setting.replace(" ", "-"), rule)
                _run([f"algorithm={rule}", *overrides, "epochs=2", f"output_dir={out}", *COMMON])
                results = list(out.rglob("result.json"))
                runs[f"{setting} {rule}"] = _read(results[0].parent) if results else "refused"
                print(f"{setting} {rule}", file=sys.stderr)
        for path in [] if rules_only else sorted((conf_dir() / "experiment").glob("*.yaml")):
            out = Path(scratch, path.stem)
            _run(["-m", f"experiment={path.stem}", "seed=0", f"data_dir={data_dir}", f"output_dir={out}", *COMMON])
            print(path.stem, file=sys.stderr)
            for sweep in out.rglob("sweep.json"):
                for run in json.loads(sweep.read_text())["runs"]:
                    runs[f"{path.stem}: {run['label']}"] = _read(sweep.parent / run["directory"])
            shutil.rmtree(out, ignore_errors=True)  # checkpoints of large nets take gigabytes
    return runs


def _run(argv: list[str]) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        fa_bench(argv)


def _read(directory: Path) -> Any:
    result, metrics = directory / "result.json", directory / "metrics.jsonl"
    if not result.exists():
        return "no result"
    values = {key: json.loads(result.read_text()).get(key) for key in HASHES}
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return values | {"metrics": [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each run that differs between the two records or is in only one of them."""
    lines = [f"{run}: only {'before' if run in before else 'after'}" for run in sorted(before.keys() ^ after.keys())]
    for run in sorted(before.keys() & after.keys()):
        old, new = before[run], after[run]
        if old != new:
            keys = [key for key in old if old[key] != new.get(key)] if isinstance(old, dict) and isinstance(new, dict) else []
            lines.append(f"{run}: {', '.join(keys) if keys else f'{old} before, {new} after'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--data-dir", default="data")
    recording.add_argument("--rules-only", action="store_true")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        arguments.file.write_text(json.dumps(record(arguments.data_dir, arguments.rules_only), indent=1) + "\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in (arguments.before, arguments.after))
    lines = compare(before, after)
    print("\n".join([*lines, f"{len(before)} runs before, {len(after)} after, {len(lines)} differ"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
