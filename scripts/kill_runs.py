"""Kills runs and sweeps at random moments, restarts them, and compares the results with those of uninterrupted runs.

    python scripts/kill_runs.py --kills 100 --seed 0

Every trial starts a command in an empty folder and kills it after a random time (with SIGKILL, SIGTERM or SIGINT). The same
command is started again, and may be killed again, until it completes. The script compares result.json (which contains the hashes
of weights, feedback, optimizer state and batches), the lines of metrics.jsonl and angles.jsonl, and all points of the curves in
TensorBoard's file. It ignores timings, memory, energy and the git state. Failed commands and leftover temporary files count as
differences. The exit code is 1 if there are any differences.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tqdm import tqdm

import fa_bench.analyses  # noqa: F401  modules that commands import are imported once, here
from fa_bench import cli
from fa_bench.runs import train  # noqa: F401
from fa_bench.utils.files import ANGLES, METRICS, RESULT

#: Settings of all runs: a small net with batch normalisation, and checkpoints that are also written within epochs.
COMMON = [
    "architecture.widths=[24,16]",
    "architecture.batch_norm=true",
    "batch_size=32",
    "epochs=4",
    "probe_every=25",
    "checkpoint_minutes=0.001",
    "threads=1",
]
#: Rules with additional state: a separate optimizer for B, masks, or a phase before training.
RULES = {
    "kp": ["optimizer@feedback_optimizer=adam", "feedback_optimizer.lr=0.001"],
    "pfa": ["algorithm.density=0.5", "algorithm.ratio=2", "optimizer.first_epoch_weight_decay=0.01"],
    "wm": ["algorithm.initial_steps=400"],
}
SINGLE = {name: [f"algorithm={name}", *options, *COMMON, "hydra.run.dir=run"] for name, options in RULES.items()}
COMMANDS = {**SINGLE, "sweep": ["-m", "algorithm=kp,brsf,wm", "seed=0,1", *COMMON, "hydra.sweep.dir=sweep"]}
#: Keys that may differ between runs with bitwise identical results, including `git`, because the checkout may change during the
#: trials.
MAY_DIFFER = ("seconds", "peak_memory_bytes", "energy_wh", "git")
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]


def start(command: list[str], folder: Path) -> int:
    """Start a command in a folder in a new process, and return the process ID."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(folder)
    with open("log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = 70
        try:
            code = cli.main(command)
        except KeyboardInterrupt:  # SIGINT came before or after main, which handles it itself
            code = 130
        finally:
            sys.stdout.flush()
            os._exit(code)


def wait_for(pid: int, seconds: float) -> int | None:
    """The exit status of a process, or None if the process does not end within the given number of seconds."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def records(folder: Path) -> dict[str, Any]:
    """The records of all runs below a folder, without the keys in `MAY_DIFFER`."""
    runs: dict[str, Any] = {}
    for path in sorted(folder.rglob(RESULT)):
        run = path.parent
        result = json.loads(path.read_text())
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        (events,) = run.glob("events.out.tfevents.*")
        curves = EventAccumulator(str(events), size_guidance={SCALARS: 0}).Reload()
        runs[str(run.relative_to(folder))] = {
            "result": {key: value for key, value in result.items() if key not in MAY_DIFFER},
            "metrics": [{key: value for key, value in line.items() if key not in MAY_DIFFER} for line in lines],
            "angles": (run / ANGLES).read_text().splitlines(),
            "curves": {
                tag: [(event.step, repr(event.value)) for event in curves.Scalars(tag)]
                for tag in curves.Tags()["scalars"]
                if not tag.endswith(MAY_DIFFER)
            },
        }
    return runs


def differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    """A line for each difference between two nested records."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        return [
            line
            for key in sorted({*expected, *actual})
            for line in differences(expected.get(key), actual.get(key), f"{path}/{key}")
        ]
    return [] if expected == actual else [f"{path}: {str(expected)[:200]} without kills, {str(actual)[:200]} with"]


def trial(command: list[str], folder: Path, seconds: float, kills: int, rng: random.Random, signals: Counter[str]) -> None:
    """Run a command until it completes, killing it at most `kills` times.

    Raises:
        RuntimeError: if the command fails, or does not end as expected after a signal.
    """
    while True:
        pid = start(command, folder)
        status = wait_for(pid, rng.uniform(0, seconds) if kills else 600)
        if status is None and not kills:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise RuntimeError("the command did not end in 600 s without further kills")
        if status is None:
            number = rng.choice(SIGNALS)
            signals[signal.Signals(number).name] += 1
            kills -= 1
            os.kill(pid, number)
            if (status := wait_for(pid, 20)) is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise RuntimeError(f"{signal.Signals(number).name} did not end the process in 20 s")
            # The process may have ended just before the signal, and SIGTERM may arrive while the command does not handle it.
            allowed = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, 0)}[number]
            if (code := os.waitstatus_to_exitcode(status)) not in allowed:
                raise RuntimeError(f"exit code {code} after {signal.Signals(number).name}")
            continue
        if (code := os.waitstatus_to_exitcode(status)) != 0:
            raise RuntimeError(f"exit code {code}")
        return


def run_trials(name: str, kills: int, rng: random.Random, bar: tqdm[Any]) -> dict[str, Any]:
    """Perform trials of one command until its processes have been killed `kills` times in total.

    Returns:
        The numbers of trials and kills, the kills by signal, the seconds of an uninterrupted run, and the differences.
    """
    command, signals, lines, trials = COMMANDS[name], Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "uninterrupted")
        folder.mkdir()
        before = time.monotonic()
        trial(command, folder, 0, 0, rng, signals)
        seconds, expected = time.monotonic() - before, records(folder)
        while (done := sum(signals.values())) < kills:
            trials += 1
            folder = Path(scratch, f"trial{trials}")
            folder.mkdir()
            new = []
            try:
                trial(command, folder, seconds, min(kills - done, rng.randint(1, 6)), rng, signals)
                new += [f"{name} {trials}: {line}" for line in differences(expected, records(folder))]
                new += [f"{name} {trials}: temporary file remains: {path}" for path in folder.rglob(".*.tmp")]
            except Exception as error:
                log = (folder / "log.txt").read_text().splitlines()[-4:]
                new.append(f"{name} {trials}: {error}: {' | '.join(log)}")
            lines += new
            with contextlib.suppress(BrokenPipeError):
                for line in new:
                    tqdm.write(line, file=sys.stderr)
            bar.update(sum(signals.values()) - done)
            shutil.rmtree(folder)
    return {"trials": trials, "kills": sum(signals.values()), "signals": dict(signals), "seconds": seconds, "differences": lines}


def main() -> int:
    """Perform the trials of all chosen commands, print a table of the results, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="total number of kills, spread over the commands")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times and signals")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    rng, names = random.Random(arguments.seed), arguments.only
    torch.set_num_threads(1)
    print("| command | trials | kills | by signal | uninterrupted, s | differences |\n|---|---|---|---|---|---|")
    differs = False
    with tqdm(total=arguments.kills, unit="kill", disable=None, leave=False) as bar:
        for number, name in enumerate(names):
            kills = arguments.kills // len(names) + (number < arguments.kills % len(names))
            with contextlib.suppress(BrokenPipeError):
                result = run_trials(name, kills, rng, bar)
                differs |= bool(result["differences"])
                signals = ", ".join(f"{count} {signal}" for signal, count in sorted(result["signals"].items()))
                tqdm.write(
                    f"| {name} | {result['trials']} | {result['kills']} | {signals} | {result['seconds']:.1f} | "
                    f"{len(result['differences'])} |"
                )
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
