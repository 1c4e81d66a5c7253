"""Memory limits: what does not fit is refused before it is allocated, because Linux promises memory that it does not have."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fa_bench.errors import ConfigError, FaBenchError, first_line

F = TypeVar("F", bound=Callable[..., Any])

#: Smaller requests are not checked.
_SMALL = 1 << 24
#: torch's functions that allocate a tensor of a given size, as modules and rules call them.
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "eye")


def available() -> int | None:
    """Bytes of memory that this process may still allocate, on its machine and in its container; None if unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        if (most := (group / "memory.max").read_text().strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            limits.append(int(most) - int((group / "memory.current").read_text()) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # another system, or a container that hides it
    if not limits and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits), 0) if limits else None


def require(needed: float, what: str) -> None:
    """Raise an error if something does not fit into memory.

    Args:
        needed: bytes.
        what: what needs them, and the option to reduce.

    Raises:
        ConfigError: naming what needs the memory, its size, and the size available.
    """
    if needed > _SMALL and (free := available()) is not None and needed > free:
        raise ConfigError(f"{what}: needs {_size(needed)} of memory, but only {_size(free)} is available")


def _size(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number < 1e15 else f"{number / 1e9:.0e} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, numpy or one of torch's allocators says that memory could not be allocated."""
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and any(
        phrase in text for phrase in ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation",
                                  "would overflow", "numel: integer multiplication overflow", "Overflow when unpacking")))


def short(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message, or that memory ran out."""
    if is_out_of_memory(error):
        return "out of memory; make batch_size or the architecture smaller"
    kind, text = type(error).__name__, first_line(error)
    return f"{kind}: {text}" if text != kind else kind


def within_memory(build: F) -> F:
    """Decorate a function that builds a run's parts: it raises a ConfigError if they do not fit into memory.

    A model or feedback that is too large is refused before it is allocated, anything else when its allocation fails.
    """
    @functools.wraps(build)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from torch.overrides import TorchFunctionMode

        class Sized(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if getattr(function, "__name__", "") in _FACTORIES:
                    require(4 * _count(args, kwargs or {}), f"a tensor of {_shape(args)} in the model or its feedback")
                return function(*args, **kwargs or {})

        try:
            with Sized():
                return build(*args, **kwargs)
        except FaBenchError:
            raise
        except (MemoryError, RuntimeError, OverflowError, TypeError) as error:
            if isinstance(error, OverflowError) or is_out_of_memory(error):
                raise ConfigError("the run does not fit into memory; make the architecture, the dataset or the feedback smaller "
                                  f"({first_line(error)})") from None
            raise

    return wrapped  # type: ignore[return-value]


def _sizes(args: Any) -> list[int]:
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else args
    return [size for size in sizes if isinstance(size, int)]


def _count(args: Any, kwargs: dict[str, Any]) -> int:
    device = kwargs.get("device")
    if device is not None and not str(device).startswith("cpu"):
        return 0
    sizes = _sizes((kwargs["size"],) if "size" in kwargs else args)
    return math.prod(sizes) if sizes else 0


def _shape(args: Any) -> str:
    return "x".join(map(str, _sizes(args)))
