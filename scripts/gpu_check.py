"""Checks fa_bench on a GPU, and writes the results to gpu_check.md and gpu_check.json.

    python scripts/gpu_check.py --data-dir FOLDER --output-dir FOLDER [--minutes 9] [--device cuda] [--only PART,...]

Every part runs in a separate process and has a share of the time. Later parts get the time that earlier parts did not use. A part
is skipped, with a note on the page, if too little time is left for it. An error, a crash or a hang ends only the part in which it
occurs. The page is updated as rows are added. The output of the parts is in gpu_check.log. The exit code is 1 if a check failed
or a part had an error.

The folder that --data-dir names contains MNIST (as torchvision stores it) and CIFAR-10. CIFAR-10 may be cifar-10-batches-py,
cifar10_jpeg.tar.xz, or train/ and test/ with a folder of images for each class. Parts whose data are missing are skipped. With
--device cpu, only the logic of the script is tested.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

from gpu.page import ERROR, FAILED, Section, write_page  # noqa: E402
from gpu.parts import Context, Part, run_all, run_here, run_in_process  # noqa: E402


def _part(module: str, function: str) -> Any:
    """A function that imports and calls the function of a part.

    The import is delayed, so that a process imports only the part that it runs.
    """

    def run(context: Context, section: Section) -> None:
        import importlib

        getattr(importlib.import_module(f"gpu.{module}"), function)(context, section)

    return run


PARTS = (
    Part("equality", "Equality with the CPU", _part("equality", "run"), 60, 10),
    Part("options", "Options of runs", _part("options", "run"), 130, 10),
    Part("determinism", "Determinism", _part("options", "determinism"), 50, 10),
    Part("steps", "Time of a step", _part("steps", "run"), 90, 15),
    Part("processes", "Several processes on one GPU", _part("steps", "processes"), 60, 25),
    Part("pfa_fig2", "MNIST: the protocol of Li and Benna 2024, Fig. 2, shortened", _part("training", "figure2"), 70, 20),
    Part("cifar", "ResNets on CIFAR-10", _part("training", "cifar"), 80, 30),
)


def main(argv: list[str] | None = None) -> int:
    """Run the check or one part of it, and return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--worker"]:
        from gpu.steps import work

        work(*given[1:])
        return 0
    arguments = parse(given)
    if arguments.part:
        return part_process(arguments)
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the current part is ended, too
    try:
        return check(arguments, given)
    finally:
        signal.signal(signal.SIGTERM, earlier)


def check(arguments: argparse.Namespace, given: list[str]) -> int:
    """Run each of the chosen parts in its own process, write the page, and return the exit code."""
    start = time.time()
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    sections = [Section(part.name, part.title) for part in parts]
    output: Path = arguments.output_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)
    log = output / "gpu_check.log"
    log.write_bytes(b"")
    facts = header(arguments, given)

    def write() -> None:
        write_page(output, {**facts, "time used": f"{time.time() - start:.0f} s of {60 * arguments.minutes:.0f} s"}, sections)

    write()
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as scratch:

        def run_one(part: Part, section: Section, until: float) -> None:
            folder = Path(scratch) / part.name
            folder.mkdir()
            command = [
                sys.executable,
                __file__,
                "--part",
                part.name,
                "--deadline",
                repr(until),
                "--device",
                arguments.device,
                "--data-dir",
                str(arguments.data_dir.resolve()),
                "--output-dir",
                str(folder),
            ]
            print(f"{time.time() - start:5.0f} s  {part.title}", flush=True)
            run_in_process(command, section, folder / "section.json", log, until, write)
            print(f"{time.time() - start:5.0f} s  {section.status}: {section.checks} checks, {section.misses} failed", flush=True)

        run_all(parts, sections, start + 60 * arguments.minutes, run_one, write)
    write()
    print(f"{output / 'gpu_check.md'}")
    return int(any(section.status in (ERROR, FAILED) for section in sections))


def part_process(arguments: argparse.Namespace) -> int:
    """Run one part in this process, and return the exit code."""
    part = next(part for part in PARTS if part.name == arguments.part)
    scratch: Path = arguments.output_dir
    section = Section(part.name, part.title, path=scratch / "section.json")
    os.chdir(scratch)
    return run_here(part, Context(arguments.device, arguments.data_dir, scratch, arguments.deadline), section)


def parse(given: list[str]) -> argparse.Namespace:
    """The parsed options."""

    def names(text: str) -> list[str]:
        chosen, known = [name.strip() for name in text.split(",")], [part.name for part in PARTS]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a part (allowed: {', '.join(known)})")
        return chosen

    def minutes(text: str) -> float:
        value = float(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=minutes, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=names, default=[], metavar="PART,...")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def header(arguments: argparse.Namespace, given: list[str]) -> dict[str, str]:
    """The information about the machine and the code that appears at the top of the page."""
    from importlib.metadata import version

    from fa_bench.runs.hashes import code_hash
    from fa_bench.runs.record import git_state

    git = git_state()
    commit = "unknown (no git repository)" if git["commit"] is None else git["commit"] + " with changes" * bool(git["dirty"])
    return {
        "device": device_and_driver(arguments.device),
        "torch": version("torch"),
        "Python": platform.python_version(),
        "commit": commit,
        "hash of the code": code_hash(),
        "command": shlex.join(["python", "scripts/gpu_check.py", *given]),
    }


def device_and_driver(device: str) -> str:
    """The name, driver and memory of each GPU, as printed by nvidia-smi, or a note if `device` is "cpu" or nvidia-smi fails."""
    if device == "cpu":
        return f"cpu ({platform.machine()}): the logic of the check only"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__}: nvidia-smi)"
    return "; ".join(line.strip() for line in found.splitlines())


if __name__ == "__main__":
    sys.exit(main())
