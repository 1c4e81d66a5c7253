"""Kills runs and sweeps at random moments, starts them again, and compares what comes out with runs that were left alone.

    python scripts/kill_runs.py --kills 100 --seed 0

Every trial starts a command in an empty folder, kills it after a random time (SIGKILL, SIGTERM or SIGINT) and starts the same
command again, until it ends by itself. Compared are the hashes of weights, feedback, optimizer state and batches, the lines of
metrics.jsonl and the result without their seconds, and every curve in TensorBoard's file, point by point. Ends with 1 where
anything differs.
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

import fa_bench.analyses  # noqa: F401  what commands import is imported once, here, and not in each of them
from fa_bench import cli
from fa_bench.runs import train  # noqa: F401
from fa_bench.utils.files import METRICS, RESULT

#: Small nets with batch normalisation; checkpoints also within epochs.
COMMON = ["architecture.widths=[24,16]", "architecture.batch_norm=true", "batch_size=32", "epochs=4", "probe_every=25",
          "checkpoint_minutes=0.001", "threads=1"]
#: Each with what makes its state delicate: an optimizer of its own for B, masks, a phase before training.
RULES = {
    "kp": ["optimizer@feedback_optimizer=adam", "feedback_optimizer.lr=0.001"],
    "pfa": ["algorithm.density=0.5", "algorithm.ratio=2", "optimizer.first_epoch_weight_decay=0.01"],
    "wm": ["algorithm.initial_steps=400"],
}
SINGLE = {name: [f"algorithm={name}", *options, *COMMON, "hydra.run.dir=run"] for name, options in RULES.items()}
COMMANDS = {**SINGLE, "sweep": ["-m", "algorithm=kp,brsf,wm", "seed=0,1", *COMMON, "hydra.sweep.dir=sweep"]}
#: What two runs of the same bits may differ in; the checkout may change while they run.
MAY_DIFFER = ("seconds", "peak_memory_bytes", "git")
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT]


def start(command: list[str], folder: Path) -> int:
    """Start a command in a folder, in a process of its own; its process number."""
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
        except KeyboardInterrupt:  # before or behind main, as Python itself ends then
            code = 130
        finally:
            sys.stdout.flush()
            os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit status of a process that ends within some seconds, or None."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def records(folder: Path) -> dict[str, Any]:
    """Everything that the runs below a folder recorded, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob(RESULT)):
        run = path.parent
        result = json.loads(path.read_text())
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        (events,) = run.glob("events.out.tfevents.*")
        curves = EventAccumulator(str(events), size_guidance={SCALARS: 0}).Reload()
        found[str(run.relative_to(folder))] = {
            "result": {key: value for key, value in result.items() if key not in MAY_DIFFER},
            "metrics": [{key: value for key, value in line.items() if key not in MAY_DIFFER} for line in lines],
            "curves": {tag: [(event.step, repr(event.value)) for event in curves.Scalars(tag)]
                       for tag in curves.Tags()["scalars"] if not tag.endswith(MAY_DIFFER)},
        }
    return found


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """The places in which two nested records differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [found for key in sorted({*one, *other}) for found in differences(one.get(key), other.get(key), f"{path}/{key}")]
    return [] if one == other else [f"{path}: {str(one)[:200]} without kills, {str(other)[:200]} with"]


def trial(command: list[str], folder: Path, seconds: float, kills: int, chance: random.Random, signals: Counter[str]) -> None:
    """Run a command to its end, killing it at most `kills` times; raises RuntimeError where it fails by itself."""
    while True:
        pid = start(command, folder)
        status = ended(pid, chance.uniform(0, seconds) if kills else 600)
        if status is None:
            number = chance.choice(SIGNALS)
            signals[signal.Signals(number).name] += 1
            kills -= 1
            os.kill(pid, number)
            if (status := ended(pid, 20)) is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise RuntimeError(f"{signal.Signals(number).name} did not end the process in 20 s")
            # It may have come to its end just before, and SIGTERM before or behind the command's own handling.
            allowed = {signal.SIGKILL: (-9, 0), signal.SIGTERM: (143, -15, 0), signal.SIGINT: (130, 0)}[number]
            if (code := os.waitstatus_to_exitcode(status)) not in allowed:
                raise RuntimeError(f"exit code {code} after {signal.Signals(number).name}")
            continue
        if (code := os.waitstatus_to_exitcode(status)) != 0:
            raise RuntimeError(f"exit code {code}")
        return


def torment(name: str, kills: int, chance: random.Random, bar: tqdm[Any]) -> dict[str, Any]:
    """Trials of one command until it has been killed `kills` times.

    Returns:
        The numbers of trials and of kills, the latter by signal, and what differed.
    """
    command, signals, found, trials, told = COMMANDS[name], Counter[str](), [], 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "alone")
        place.mkdir()
        before = time.monotonic()
        trial(command, place, 0, 0, chance, signals)
        seconds, expected = time.monotonic() - before, records(place)
        while (done := sum(signals.values())) < kills:
            trials += 1
            place = Path(scratch, f"trial{trials}")
            place.mkdir()
            try:
                trial(command, place, seconds, min(kills - done, chance.randint(1, 6)), chance, signals)
                found += [f"{name} {trials}: {text}" for text in differences(expected, records(place))]
                found += [f"{name} {trials}: left behind: {path}" for path in place.rglob(".*.tmp")]
            except Exception as error:
                log = (place / "log.txt").read_text().splitlines()[-4:]
                found.append(f"{name} {trials}: {error}: {' | '.join(log)}")
            for text in found[told:]:
                tqdm.write(text, file=sys.stderr)
            told = len(found)
            bar.update(sum(signals.values()) - done)
            shutil.rmtree(place)
    return {"trials": trials, "kills": sum(signals.values()), "signals": dict(signals), "seconds": seconds, "differences": found}


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, spread over the commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    chance, names = random.Random(arguments.seed), arguments.only
    torch.set_num_threads(1)
    print("| command | trials | kills | by signal | uninterrupted, s | differences |\n|---|---|---|---|---|---|")
    differs = False
    with tqdm(total=arguments.kills, unit="kill", disable=None, leave=False) as bar:
        for number, name in enumerate(names):
            kills = arguments.kills // len(names) + (number < arguments.kills % len(names))
            with contextlib.suppress(BrokenPipeError):
                result = torment(name, kills, chance, bar)
                signals = ", ".join(f"{count} {signal}" for signal, count in sorted(result["signals"].items()))
                tqdm.write(f"| {name} | {result['trials']} | {result['kills']} | {signals} | {result['seconds']:.1f} | "
                           f"{len(result['differences'])} |")
                differs |= bool(result["differences"])
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
