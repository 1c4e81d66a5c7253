"""Times each part of a report on many runs, and measures the peak memory.

The script generates the records of the runs and does not train anything.

The records resemble those of a sweep over rules, learning rates and seeds, with the metrics of every epoch and the angles of
every layer. Each part is timed in CPU seconds, which other processes hardly affect.

    python scripts/bench_report.py [--rules 10] [--settings 10] [--seeds 10] [--epochs 20] [--layers 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fa_bench.command.compose import Composer
from fa_bench.config.job import register_schemas

RULES = ("bp", "frozen", "fa", "dfa", "kp", "usf", "brsf", "frsf", "wm", "pfa", "drtp", "local_error")
QUANTITIES = ("weight_angle", "delta_angle", "norm_ratio", "delta_angle_one_step", "true_gradient_norm")


def write_runs(folder: Path, rules: int, settings: int, seeds: int, epochs: int, layers: int) -> int:
    """Generate the records of all runs in subfolders of `folder`, and return the number of runs."""
    register_schemas()
    generator = random.Random(0)
    names = [f"fc{number}" for number in range(1, layers + 1)]
    for rule in RULES[:rules]:
        composer = Composer("config", None, [f"algorithm={rule}", f"epochs={epochs}"])
        config = composer.check(composer.expand(multirun=False))[0][0].plain()
        for setting in range(settings):
            config["optimizer"]["lr"] = round(0.01 * 2**setting, 4)
            group = f"{rule}-{setting:08x}"
            for seed in range(seeds):
                directory = folder / group / f"seed{seed}"
                directory.mkdir(parents=True)
                config["seed"] = seed
                _write(directory, config, group, epochs, names, generator)
    return min(rules, len(RULES)) * settings * seeds


def _write(directory: Path, config: dict[str, Any], group: str, epochs: int, layers: list[str], generator: random.Random) -> None:
    final = 0.9 + 0.05 * generator.random()
    angles = {name: {layer: 90 * generator.random() for layer in layers} for name in QUANTITIES}
    lines = [
        {
            "epoch": epoch,
            "train_loss": math.exp(-epoch / 5),
            "val_loss": 0.4,
            "test_loss": 0.5,
            "train_accuracy": 0.9,
            "val_accuracy": final - 0.1 / epoch,
            "test_accuracy": final - 0.2 / epoch,
            "lr": config["optimizer"]["lr"],
            "seconds": 0.5 * epoch,
            "angles": angles,
            "probes": {},
        }
        for epoch in range(1, epochs + 1)
    ]
    result = {
        "status": "finished",
        "label": config["algorithm"]["name"],
        "group": group,
        "experiment": None,
        **{key: config[key]["name"] for key in ("algorithm", "architecture", "dataset", "optimizer")},
        "seed": config["seed"],
        "epochs": epochs,
        "epoch": epochs,
        "test_accuracy": lines[-1]["test_accuracy"],
        "test_accuracy_at_best_val": lines[-1]["test_accuracy"],
        "best_epoch": epochs,
        "val_accuracy": lines[-1]["val_accuracy"],
        "train_accuracy": 0.9,
        "angles": angles,
        "feedback_layers": layers[1:],
        "output_layers": layers[-1:],
        "seconds": 0.5 * epochs,
        "code_hash": "c" * 16,
        "data_hash": "d" * 64,
        "error": None,
    }
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text(f"# config hash: {'a' * 16}\n# code hash: {'c' * 16}\n" + OmegaConf.to_yaml(config))


def measure(folder: Path, out_dir: Path) -> None:
    """Print the CPU time of each part of a report on the runs below `folder`, the total, and the peak memory."""
    from fa_bench.report import references, write_report
    from fa_bench.report.best import choose_best
    from fa_bench.report.export import runs_table, to_json, to_latex
    from fa_bench.report.groups import in_order
    from fa_bench.report.layers import by_layer
    from fa_bench.report.runs import find_runs, read_run
    from fa_bench.report.table import summarise
    from fa_bench.report.text import to_csv, to_markdown, to_text
    from fa_bench.utils.drawing import default_style

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.process_time()
        value = function()
        print(f"{name:32} {time.process_time() - start:7.2f} s", flush=True)
        return value

    directories = timed("find the runs", lambda: find_runs([folder]))
    runs = timed("read them", lambda: [run for directory in directories if (run := read_run(directory))])
    runs = timed("order and label them", lambda: in_order(runs))
    frame = timed("the table", lambda: summarise(runs))
    timed("the table, nearest references", lambda: summarise(runs, reference=references.NEAREST))
    timed(
        "Markdown, text, JSON, LaTeX, CSV", lambda: [write(frame) for write in (to_markdown, to_text, to_json, to_latex, to_csv)]
    )
    timed("runs.csv", lambda: to_csv(runs_table(runs, out_dir)))
    timed("the table of layers", lambda: by_layer(runs))
    timed("choose the best learning rates", lambda: choose_best(runs, ["optimizer.lr"]))
    with default_style():
        from fa_bench.report.figures import write_figures

        out_dir.mkdir()
        timed("figures", lambda: write_figures(runs, out_dir, "report"))
    timed("the whole report", lambda: write_report(directories, out_dir / "whole"))
    timed("the whole report, --best", lambda: write_report(directories, out_dir / "best", best=["optimizer.lr"]))
    unit = 1024 ** (3 if sys.platform == "darwin" else 2)  # macOS counts bytes, Linux KiB
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB")


def main() -> None:
    """Write the records, and time a report on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rules", 10), ("settings", 10), ("seeds", 10), ("epochs", 20), ("layers", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="a new folder, in which the records and the reports are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        sizes = (arguments.rules, arguments.settings, arguments.seeds, arguments.epochs, arguments.layers)
        print(f"{write_runs(folder / 'runs', *sizes)} runs")
        measure(folder / "runs", folder / "out")


if __name__ == "__main__":
    main()
