"""Checkpoints: everything that a run needs to resume with bitwise identical results, in plain containers and tensors."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fa_bench.callbacks.base import Callback
from fa_bench.errors import RunDirectoryError, describe_error
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim.optimizers import Optimizers
from fa_bench.runs.hashes import DIGITS
from fa_bench.runs.loop import Progress
from fa_bench.utils.files import atomic, output_errors, temporary_name
from fa_bench.utils.process import random_state, restore_random_state

VERSION = 5


class Expected(NamedTuple):
    """The values that a checkpoint must match.

    Attributes:
        config_hash: the config hash of the run.
        data_hash: the hash of the run's current data.
        epochs: the number of epochs that the run trains.
        steps: the number of batches in an epoch.
    """

    config_hash: str
    data_hash: str
    epochs: int
    steps: int


def save(
    path: Path,
    previous: Path,
    config_hash: str,
    data_hash: str,
    progress: Progress,
    rule: Rule,
    optimizers: Optimizers,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Write a checkpoint atomically to `path`; an earlier checkpoint at `path` is kept as `previous`.

    Raises:
        OutputError: if it cannot be written; the earlier checkpoints are unchanged.
    """
    # The checkpoint is first saved to memory, because torch.save does not report a full disk clearly, whereas a plain write does.
    buffer = io.BytesIO()
    torch.save(
        {
            "version": VERSION,
            "config_hash": config_hash,
            "data_hash": data_hash,
            **capture(progress, rule, optimizers, callbacks),
        },
        buffer,
    )
    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        # `write_bytes` is not used, because its frame would keep the buffer in use after a failure, and Python 3.13 would warn
        # about this during garbage collection.
        with temporary.open("wb") as file, buffer.getbuffer() as content:
            file.write(content)
        if path.exists():
            _link(path, previous)


def capture(progress: Progress, rule: Rule, optimizers: Optimizers, callbacks: Iterable[Callback] = ()) -> dict[str, Any]:
    """The state of a run, as plain containers and tensors."""
    return {
        "progress": vars(progress),
        "model": rule.model.state_dict(),
        "rule": rule.state_dict(),
        "optimizers": optimizers.state_dict(),
        "callbacks": {callback.name: state for callback in callbacks if (state := callback.state_dict())},
        "random": random_state(),
    }


def restore(state: dict[str, Any], rule: Rule, optimizers: Optimizers, callbacks: Iterable[Callback] = ()) -> None:
    """Restore everything that `capture` returned except the progress."""
    rule.model.load_state_dict(state["model"])
    rule.load_state_dict(state["rule"])
    optimizers.load_state_dict(state["optimizers"])
    for callback in callbacks:
        callback.load_state_dict(state["callbacks"].get(callback.name, {}))
    restore_random_state(state["random"])


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, replacing any other file with that name."""
    link = name.with_name(temporary_name(name.name))
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links: for a moment only the new name exists
        os.replace(path, link)
    os.replace(link, name)


def load(
    paths: Iterable[Path],
    expected: Expected,
    rule: Rule,
    optimizers: Optimizers,
    warn: Callable[[str], Any],
    callbacks: Iterable[Callback] = (),
) -> Progress:
    """Restore a rule, its model and its optimizers from the first usable checkpoint in `paths`, and return the run's progress.

    Args:
        paths: the checkpoint files, newest first; missing ones are skipped.
        expected: the values that they must match.
        rule: a rule attached to a model of this run.
        optimizers: the optimizers of this run.
        warn: called with a line about each unusable checkpoint, if another one is usable.
        callbacks: the callbacks of this run.

    Raises:
        RunDirectoryError: if none is usable; the message names each checkpoint and the reason.
    """
    faults: list[str] = []
    for path in filter(Path.exists, paths):
        try:
            state = read(path, expected.config_hash, next(rule.model.parameters()).device)
            if (data_hash := state["data_hash"]) != expected.data_hash:
                raise RunDirectoryError(f"{path}: trained on different data (hash {data_hash}; now {expected.data_hash})")
            progress = _progress(state["progress"], expected)
            restore(state, rule, optimizers, callbacks)
        except RunDirectoryError as error:
            faults.append(str(error))
        except Exception as error:  # a forged state may make the functions that load it raise anything
            faults.append(f"{path}: not a checkpoint of this run ({describe_error(error)})")
        else:
            for fault in faults:
                warn(f"{fault}; resuming from {path}")
            return progress
    raise RunDirectoryError("; ".join(faults) or "no checkpoint")


def _progress(saved: dict[str, Any], expected: Expected) -> Progress:
    """The saved progress of a run; raises a TypeError or ValueError for values that no run would save."""
    progress = Progress(**saved)

    def is_count(value: Any, maximum: float = math.inf) -> bool:
        return type(value) is int and 0 <= value <= maximum

    def is_number(value: Any, minimum: float = 0) -> bool:
        return type(value) in (int, float) and minimum <= value < math.inf

    def is_sum(value: Any) -> bool:
        return (isinstance(value, torch.Tensor) and not value.dim()) or (value is None and not progress.batch)

    def are_sums(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(name, str) and isinstance(item, torch.Tensor) for name, item in value.items()
        )

    def is_angles(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(layers, dict) and all(type(angle) is float for angle in layers.values()) for layers in value.values()
        )

    def is_record(value: Any, **kinds: Any) -> bool:
        return value is None or (
            isinstance(value, dict)
            and value.keys() == kinds.keys()
            and all(isinstance(value[key], kind) for key, kind in kinds.items())
        )

    checks: dict[str, Callable[[Any], Any]] = {
        "epoch": lambda value: is_count(value, expected.epochs),
        "batch": lambda value: is_count(value, expected.steps if progress.epoch < expected.epochs else 0),
        "step": lambda value: is_count(value) and value == progress.epoch * expected.steps + progress.batch,
        "samples": lambda value: is_count(value) or (isinstance(value, torch.Tensor) and not value.dim()),
        "measurements": is_count,
        "probed": lambda value: value is None or is_count(value, progress.step),
        "best_epoch": lambda value: value is None or is_count(value, progress.epoch),
        **dict.fromkeys(("seconds", "compile_seconds"), is_number),
        "energy_wh": lambda value: value is None or is_number(value),
        "best_val": lambda value: value is None or is_number(value, -sys.float_info.max),
        "test_at_best": lambda value: value is None or type(value) in (int, float),  # it may be undefined for the test set
        "loss_sum": is_sum,
        "sums": are_sums,
        "angles": lambda value: value is None or is_angles(value),
        "diverged": lambda value: is_record(value, epoch=int, step=int, layer=(str, type(None)), message=str),
        "stopped": lambda value: is_record(value, reason=str, callback=(str, type(None))),
        "batches_hash": lambda value: isinstance(value, str) and re.fullmatch(rf"(?:[0-9a-f]{{{DIGITS}}})?", value),
    }
    for name, is_valid in checks.items():
        if not is_valid(value := getattr(progress, name)):
            raise ValueError(f"{name}={value!r}")
    return progress


def read(path: Path, config_hash: str, device: torch.device | str) -> dict[str, Any]:
    """The content of a checkpoint, with its tensors on `device`. The file is read as pure data, so it cannot execute code.

    Raises:
        RunDirectoryError: if the file is corrupt, cannot be read, has another format version or belongs to another config.
    """
    try:
        # torch.load does not verify the checksums that torch.save writes.
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
        if corrupt is not None:
            raise RunDirectoryError(f"{path}: corrupt checkpoint: checksum mismatch in {corrupt}")
        state = torch.load(path, map_location=device, weights_only=True)
        stored, version = state["config_hash"], state["version"]
    except RunDirectoryError:
        raise
    except Exception as error:  # damaged files raise many types of errors
        raise RunDirectoryError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if version != VERSION:
        raise RunDirectoryError(f"{path}: checkpoint of format {version}; this version of fa_bench reads format {VERSION}")
    if stored != config_hash:
        raise RunDirectoryError(f"{path}: checkpoint of another config ({stored}; this run is {config_hash})")
    return state
