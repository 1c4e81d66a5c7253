"""Checkpoints: everything that a run needs to go on with the same bits, in plain containers and tensors."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fa_bench.errors import RunDirectoryError, StateError
from fa_bench.files import atomic, temporary_name
from fa_bench.mechanisms.rule import Rule
from fa_bench.optim import Optimizers
from fa_bench.process import random_state, restore_random_state
from fa_bench.runs.loop import Progress

VERSION = 2


def save(path: Path, before: Path, config_hash: str, progress: Progress, rule: Rule, optimizers: Optimizers) -> None:
    """Write a checkpoint; the one that was at `path` is kept as `before`, and until the new one is whole, at `path` too.

    Raises:
        OutputError: where it cannot be written; what was there is still there.
    """
    state = {
        "version": VERSION,
        "config_hash": config_hash,
        "progress": vars(progress),
        "model": rule.model.state_dict(),
        "rule": rule.state_dict(),
        "optimizers": optimizers.state_dict(),
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
    paths: Iterable[Path], config_hash: str, rule: Rule, optimizers: Optimizers, warn: Callable[[str], Any]
) -> Progress:
    """Put the first whole checkpoint of `paths` back into a rule, its model and its optimizers; returns where the run stands.

    Args:
        paths: the checkpoint files, the newest first; those that are not there are passed over.
        config_hash: of the run.
        rule: attached, to a model of this run.
        optimizers: of this run.
        warn: told of every checkpoint that cannot be used, where another one can.

    Raises:
        RunDirectoryError: naming every checkpoint and why it cannot be used, where none can be.
    """
    faults: list[str] = []
    for path in paths:
        if not path.exists():
            continue
        try:
            state = read(path, config_hash, next(rule.model.parameters()).device)
            try:
                rule.model.load_state_dict(state["model"])
                rule.load_state_dict(state["rule"])
                optimizers.load_state_dict(state["optimizers"])
                restore_random_state(state["random"])
                progress = Progress(**state["progress"])
            except (KeyError, RuntimeError, StateError, TypeError, ValueError) as error:
                raise RunDirectoryError(f"{path}: not a checkpoint of this run ({str(error).splitlines()[0]})") from None
        except RunDirectoryError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warn(f"{fault}; going on from {path}")
        return progress
    raise RunDirectoryError("; ".join(faults) or "no checkpoint")


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
