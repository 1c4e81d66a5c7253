"""Checkpoints: everything that a run needs to go on with the same bits, in plain containers and tensors."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fa_bench.callbacks.base import Callback
from fa_bench.errors import RunDirectoryError, first_line
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim.optimizers import Optimizers
from fa_bench.runs.loop import Progress
from fa_bench.utils.files import atomic, temporary_name
from fa_bench.utils.process import random_state, restore_random_state

VERSION = 4


class Expected(NamedTuple):
    """What a checkpoint must fit.

    Attributes:
        config_hash: of the run.
        data_hash: of its data as they are now.
        epochs: that it trains.
        steps: batches in an epoch.
    """

    config_hash: str
    data_hash: str
    epochs: int
    steps: int


def save(
    path: Path, before: Path, config_hash: str, data_hash: str, progress: Progress, rule: Rule, optimizers: Optimizers,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Write a checkpoint; the one that was at `path` is kept as `before`, and until the new one is whole, at `path` too.

    Raises:
        OutputError: where it cannot be written; what was there is still there.
    """
    state = {
        "version": VERSION,
        "config_hash": config_hash,
        "data_hash": data_hash,
        "progress": vars(progress),
        "model": rule.model.state_dict(),
        "rule": rule.state_dict(),
        "optimizers": optimizers.state_dict(),
        "callbacks": {callback.name: state for callback in callbacks if (state := callback.state_dict())},
        "random": random_state(),
    }
    # Into memory first: a full disk is then found by a plain write, whose error says so.
    whole = io.BytesIO()
    torch.save(state, whole)
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(whole.getbuffer())
        if path.exists():
            _keep(path, before)


def _keep(path: Path, before: Path) -> None:
    """Give a file a second name, in the place of what had it."""
    link = before.with_name(temporary_name(before.name))
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links: for a moment there is the old one alone, by its new name
        os.replace(path, link)
    os.replace(link, before)


def load(
    paths: Iterable[Path], expected: Expected, rule: Rule, optimizers: Optimizers, warn: Callable[[str], Any],
    callbacks: Iterable[Callback] = (),
) -> Progress:
    """Put the first whole checkpoint of `paths` back into a rule, its model and its optimizers; returns where the run stands.

    Args:
        paths: the checkpoint files, the newest first; those that are not there are passed over.
        expected: what they must fit.
        rule: attached, to a model of this run.
        optimizers: of this run.
        warn: called with a line about every checkpoint that cannot be used, where another one can.
        callbacks: of this run.

    Raises:
        RunDirectoryError: naming every checkpoint and why it cannot be used, where none can be.
    """
    faults: list[str] = []
    for path in paths:
        if not path.exists():
            continue
        try:
            state = read(path, expected.config_hash, next(rule.model.parameters()).device)
            try:
                if (data := state["data_hash"]) != expected.data_hash:
                    raise RunDirectoryError(f"{path}: trained on other data (hash {data}; now {expected.data_hash})")
                progress = _progress(state["progress"], expected)
                rule.model.load_state_dict(state["model"])
                rule.load_state_dict(state["rule"])
                optimizers.load_state_dict(state["optimizers"])
                for callback in callbacks:
                    callback.load_state_dict(state["callbacks"].get(callback.name, {}))
                restore_random_state(state["random"])
            except RunDirectoryError:
                raise
            except Exception as error:  # whatever states that were not saved so make their readers raise
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise RunDirectoryError(f"{path}: not a checkpoint of this run ({reason})") from None
        except RunDirectoryError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warn(f"{fault}; resuming from {path}")
        return progress
    raise RunDirectoryError("; ".join(faults) or "no checkpoint")


def _progress(saved: dict[str, Any], expected: Expected) -> Progress:
    """Where a run stands, as saved; raises TypeError or ValueError for what no run saves."""
    progress = Progress(**saved)
    for name, most in (("epoch", expected.epochs), ("batch", expected.steps), ("step", None), ("samples", None)):
        _require_whole(name, getattr(progress, name), most)
    ended = progress.epoch == expected.epochs
    if progress.step != progress.epoch * expected.steps + progress.batch or (ended and progress.batch):
        raise ValueError(f"epoch {progress.epoch} and batch {progress.batch} are not step {progress.step} of "
                         f"{expected.epochs} epochs of {expected.steps}")
    for name, most in (("probed", progress.step), ("best_epoch", progress.epoch)):
        if getattr(progress, name) is not None:
            _require_whole(name, getattr(progress, name), most)
    for name, most in (("seconds", math.inf), ("best_val", 1), ("test_at_best", 1)):
        value: Any = getattr(progress, name)
        if not (name != "seconds" if value is None else type(value) in (int, float) and 0 <= value <= most and value < math.inf):
            raise ValueError(f"{name}={value!r}")
    sums = (progress.loss_sum, progress.hits)
    if not all((value is None and not progress.batch) or (isinstance(value, torch.Tensor) and not value.dim()) for value in sums):
        raise ValueError("loss_sum and hits are no numbers")
    for name, kind in (("angles", dict), ("diverged", dict), ("batches_hash", str)):
        value = getattr(progress, name)
        if not (isinstance(value, kind) or (value is None and kind is dict)):
            raise ValueError(f"{name}={value!r}")
    if progress.diverged is not None and not {"epoch", "step", "layer", "message"} <= progress.diverged.keys():
        raise ValueError(f"diverged={progress.diverged!r}")
    return progress


def _require_whole(name: str, value: Any, most: int | None) -> None:
    if type(value) is not int or value < 0 or (most is not None and value > most):
        raise ValueError(f"{name}={value!r}{'' if most is None else f', of {most} at most'}")


def read(path: Path, config_hash: str, device: torch.device | str) -> dict[str, Any]:
    """A checkpoint's content, its tensors on `device`. The file is read as data: nothing in it can run.

    Raises:
        RunDirectoryError: where the file is torn, cannot be read or is another config's.
    """
    try:
        # The reader of tensors does not look at the checksums that are written with them.
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        if torn is not None:
            raise RunDirectoryError(f"{path}: torn checkpoint ({torn} has another checksum)")
        state = torch.load(path, map_location=device, weights_only=True)
        stored, version = state["config_hash"], state["version"]
    except RunDirectoryError:
        raise
    except Exception as error:  # a damaged file makes the reader raise whatever it happens to meet
        raise RunDirectoryError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if version != VERSION:
        raise RunDirectoryError(f"{path}: checkpoint of format {version}, this is fa_bench's format {VERSION}")
    if stored != config_hash:
        raise RunDirectoryError(f"{path}: checkpoint of another config ({stored}; this run is {config_hash})")
    return state
