"""Checkpoints: everything that a run needs to go on with the same bits, in plain containers and tensors."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fa_bench.errors import RunDirectoryError
from fa_bench.files import write_with
from fa_bench.loop import Progress
from fa_bench.optim import Optimizers
from fa_bench.rules.base import Rule

VERSION = 1


def save(path: Path, config_hash: str, progress: Progress, rule: Rule, optimizers: Optimizers) -> None:
    """Write a checkpoint atomically."""
    state = {
        "version": VERSION,
        "config_hash": config_hash,
        "progress": dataclasses.asdict(progress),
        "model": rule.model.state_dict(),
        "rule": rule.state_dict(),
        "optimizers": optimizers.state_dict(),
        "random": random_state(),
    }
    path.parent.mkdir(exist_ok=True)
    write_with(path, lambda temporary: torch.save(state, temporary))


def load(path: Path, config_hash: str, rule: Rule, optimizers: Optimizers) -> Progress:
    """Put a checkpoint back into a rule, its model and its optimizers; returns where the run stands.

    Raises:
        RunDirectoryError: as `read` does.
    """
    state = read(path, config_hash, next(rule.model.parameters()).device)
    rule.model.load_state_dict(state["model"])
    rule.load_state_dict(state["rule"])
    optimizers.load_state_dict(state["optimizers"])
    restore_random_state(state["random"])
    return Progress(**state["progress"])


def read(path: Path, config_hash: str, device: torch.device | str) -> dict[str, Any]:
    """A checkpoint's content, its tensors on `device`. The file is read as data: nothing in it can run.

    Raises:
        RunDirectoryError: where the file cannot be read or is another config's.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        stored, version = state["config_hash"], state["version"]
    except Exception as error:  # a damaged file makes the reader raise whatever it happens to meet
        raise RunDirectoryError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if version != VERSION:
        raise RunDirectoryError(f"{path}: checkpoint of format {version}, this is fa_bench's format {VERSION}")
    if stored != config_hash:
        raise RunDirectoryError(f"{path}: checkpoint of another config ({stored}; this run is {config_hash})")
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random generator."""
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Take back what `random_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.cpu().numpy().astype(np.uint32), *rest))


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
