"""Measures the time from a command to its first training step, for one run and for a sweep of many jobs.

The script also times `fa-bench --help` and the import of torch. Each command runs in a separate process.

    python scripts/bench_start.py --jobs 1000
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

RULES = ("bp", "fa", "kp", "dfa", "usf", "frsf", "wm", "dkp", "pfa", "drtp")
#: Code that runs the command line, but ends the process when training would begin.
START = """
import os, sys
from fa_bench import cli
from fa_bench.command import jobs

call = jobs.Task.__call__

def start(self, config):
    from fa_bench.runs.loop import Trainer

    Trainer.fit = lambda self: os._exit(77)
    return call(self, config)

jobs.Task.__call__ = start
cli.main(sys.argv[1:])
"""


def seconds(*arguments: str, expected: int = 0) -> float:
    """Run Python with these arguments in an empty folder, and return the duration in seconds.

    Raises:
        RuntimeError: if the exit code is not `expected`.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        ended = subprocess.run([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        taken = time.perf_counter() - started
    if ended.returncode != expected:
        raise RuntimeError(ended.stderr.decode(errors="replace") or f"exit code {ended.returncode}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each kind; the fastest counts")
    options = parser.parse_args()
    sweep = ["-m", f"algorithm={','.join(RULES)}", f"seed=range({max(options.jobs // len(RULES), 1)})"]
    commands = {
        "import torch": (["-c", "import torch"], 0),
        "fa-bench --help": (["-m", "fa_bench", "--help"], 0),
        "fa-bench algorithm=kp, to the first step": (["-c", START, "algorithm=kp"], 77),
        f"a sweep of {options.jobs} jobs, to the first step": (["-c", START, *sweep], 77),
    }
    print(f"load before: {os.getloadavg()[0]:.2f}")
    for name, (arguments, expected) in commands.items():
        print(f"{name:45s}{min(seconds(*arguments, expected=expected) for _ in range(options.repeats)):8.2f} s")


if __name__ == "__main__":
    main()
