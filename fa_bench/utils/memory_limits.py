"""Refuse allocations that do not fit into memory. They are checked in advance, because Linux overcommits memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fa_bench.errors import ConfigError, FaBenchError, OptionError, describe_error, first_line
from fa_bench.utils.text import format_bytes, format_shape

#: Allocations up to this size in bytes are not checked.
_MIN_CHECKED = 1 << 24
#: No machine has enough memory for a tensor with this many entries or more, and for some of these sizes torch would raise errors
#: of other kinds.
_NEVER = 1 << 60
#: The torch functions with which modules and rules allocate a tensor of a given size.
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "eye")


def available_memory() -> int | None:
    """An estimate of the number of bytes that this process can still allocate within the limits of its machine and its container;
    None if unknown."""
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
        pass  # not Linux, or a container without access to these files
    if not limits and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits), 0) if limits else None


def require_memory(needed: float, what: str) -> None:
    """Refuse an allocation that does not fit into memory.

    Args:
        needed: bytes.
        what: text that names what needs the memory and, if known, which options to reduce.

    Raises:
        ConfigError: if the allocation is refused; the message names what needs the memory, its size, and the size available.
    """
    if needed > _MIN_CHECKED and (free := available_memory()) is not None and needed > free:
        raise ConfigError(f"{what}: needs {format_bytes(needed)} of memory, but only {format_bytes(free)} is available")


def require_option_memory(option: str, value: float, entries: float, what: str, device: str = "cpu") -> None:
    """Refuse an option that makes a tensor too large for memory.

    Args:
        option: the option's name.
        value: its value.
        entries: the number of entries of the tensor, in single precision.
        what: the tensor, for the error message.
        device: the type of the tensor's device; only the memory of the CPU is known.

    Raises:
        OptionError: if the tensor is too large; the message names the option and the size needed.
    """
    try:
        require_memory(4 * entries if device == "cpu" else 0, what)
    except ConfigError as error:
        raise OptionError(option, f"={value:g}: {error}") from None
    if entries >= _NEVER:
        raise OptionError(option, f"={value:g}: {what}: needs {format_bytes(4 * entries)} of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch raised the error because memory could not be allocated or a tensor's size overflowed."""
    if isinstance(error, MemoryError):
        return True
    phrases = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "Storage size calculation",
        "would overflow",
        "numel: integer multiplication overflow",
        "Overflow when unpacking",
    )
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    )


def describe_failure(error: BaseException) -> str:
    """A one-line description of an error, with its type and the first line of its message, or a note that memory ran out."""
    return "out of memory; make batch_size or the architecture smaller" if is_out_of_memory(error) else describe_error(error)


@contextmanager
def within_memory() -> Iterator[None]:
    """Within the block or the decorated function, raise a ConfigError if the parts of a run do not fit into memory.

    A tensor of the model or its feedback that is too large for the CPU's memory is refused before it is allocated. In all other
    cases, the error is raised when an allocation fails.
    """
    from torch.overrides import TorchFunctionMode

    class CheckedFactories(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in _FACTORIES:
                size = 4 * _count(args, kwargs or {})
                require_memory(size, f"a tensor of {format_shape(_sizes(args))} in the model or its feedback")
            return function(*args, **kwargs or {})

    try:
        with CheckedFactories():
            yield
    except FaBenchError:
        raise
    except (MemoryError, RuntimeError, OverflowError, TypeError) as error:
        if isinstance(error, OverflowError) or is_out_of_memory(error):
            raise ConfigError(
                "the run does not fit into memory; make the architecture, the dataset or the feedback smaller "
                f"({first_line(error)})"
            ) from None
        raise


def _sizes(args: Any) -> list[int]:
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else args
    return [size for size in sizes if isinstance(size, int)]


def _count(args: Any, kwargs: dict[str, Any]) -> int:
    device = kwargs.get("device")
    if device is not None and not str(device).startswith("cpu"):
        return 0
    sizes = _sizes((kwargs["size"],) if "size" in kwargs else args)
    return math.prod(sizes) if sizes else 0
