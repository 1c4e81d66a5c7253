"""Process-wide state, such as random generators, that runs share and that is restored after each run."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of the global random generators of torch (CPU, CUDA and MPS), Python and NumPy."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, words, position, has_gauss, gauss = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        # Another machine may have fewer devices.
        for device, generator in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(generator.cpu(), device)
    if state.get("mps") is not None and torch.backends.mps.is_available():  # states of earlier versions have no such entry
        torch.mps.set_rng_state(state["mps"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.cpu().numpy().astype(np.uint32), *rest))


def seed_everything(seed: int) -> None:
    """Seed every global random generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(enabled: bool, warn_only: bool = False) -> None:
    """Make torch refuse nondeterministic operations, or warn about them if `warn_only` is true; `enabled=False` allows them.

    Nothing is done if the setting is already in effect, because a change makes torch import its compiler, which takes a second.
    """
    if (enabled, warn_only) != (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ):
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_jobs = 0


def freeze_before_second_job() -> None:
    """Exempt all existing objects from garbage collection when this process begins its second job. Call this function before each
    job.

    Every run ends with a garbage collection. Without the exemption, the collection would traverse all of torch's modules and take
    longer than the training of a small run. By the second job, the first one has imported most of what later jobs need, and its
    model no longer exists. Call this function only in processes of the command, because in a user's program it would also exempt
    the user's objects.
    """
    global _jobs
    _jobs += 1
    if _jobs == 2:
        gc.collect()  # existing garbage would otherwise never be collected
        gc.freeze()


#: The variables of `torch.nn.modules.module`, and the names of those that hold global hooks, which a model or a plugin may leave
#: registered.
_MODULES = vars(torch.nn.modules.module)
_HOOKS = [name for name, value in _MODULES.items() if name.startswith("_global_") and isinstance(value, dict)]


def _flushes_denormals() -> bool:
    """Whether denormal float32 numbers are flushed to zero, a setting that torch cannot report."""
    return not bool(torch.full((1,), 2e-38).mul(0.1).ne(0))


@contextmanager
def isolated() -> Iterator[None]:
    """After the block, restore the process's random state, numerical settings, number of threads, global hooks and working
    directory, and free unused memory. The working directory is restored because a sweep's run directories are relative to it.
    """
    state, folder = random_state(), os.getcwd()
    hooks = {name: _MODULES[name].copy() for name in _HOOKS}
    cudnn = torch.backends.cudnn
    settings = {
        torch.set_default_dtype: torch.get_default_dtype(),
        torch.set_num_threads: torch.get_num_threads(),
        torch.set_grad_enabled: torch.is_grad_enabled(),
        torch.set_anomaly_enabled: torch.is_anomaly_enabled(),
        torch.set_float32_matmul_precision: torch.get_float32_matmul_precision(),
    }
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    flushed = _flushes_denormals()
    error_state, workspace = np.geterr(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        yield
    finally:
        with suppress(OSError):  # it has been removed
            os.chdir(folder)
        restore_random_state(state)
        for name, hook in hooks.items():
            current = _MODULES[name]
            current.clear()
            current.update(hook)
        for restore, value in settings.items():
            restore(value)  # type: ignore[arg-type]
        set_deterministic(*deterministic)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags
        torch.set_flush_denormal(flushed)
        np.seterr(**error_state)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
        # A model and its rule refer to each other and would count towards the next run's peak memory if they were not collected.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
