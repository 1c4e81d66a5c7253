"""The energy counters of the machine: RAPL for processors, and NVML for NVIDIA GPUs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: The directory in which Linux lists the counters of processor packages, their parts, and memory.
POWERCAP = Path("/sys/class/powercap")
_WH = 3600.0  # joules


class Counter(Protocol):
    """A counter of energy."""

    def joules(self) -> float:
        """The energy since an arbitrary fixed time; raises an error if the counter can no longer be read."""
        ...


class Rapl:
    """The counter of one RAPL domain, which is a processor package or its memory. The counter includes the energy used by all
    processes.

    Raises:
        OSError: the counter cannot be read; on most systems, only root can read it.
        ValueError: the counter's file does not contain a number.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._turns = int(self._file.read_text()), 0

    def joules(self) -> float:
        """The energy so far. The value is correct if this method is called more often than the counter wraps around."""
        now = int(self._file.read_text())
        self._turns += now < self._last
        self._last = now
        return (now + self._turns * (self._range + 1)) / 1e6


class Nvml:
    """The energy counter of one GPU, read through the package nvidia-ml-py.

    Raises:
        ImportError: the package is missing.
        Exception: NVML's own errors, for example if there is no driver or the GPU has no counter (older than Volta).
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._device = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.joules()

    def joules(self) -> float:
        """The energy since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) / 1e3


class EnergyMeter:
    """Measures the energy that is used between two readings of counters.

    Args:
        counters: by name; at least one.
    """

    def __init__(self, counters: dict[str, Counter]) -> None:
        self._counters = counters
        self._before: float | None = None

    @classmethod
    def of(cls, device: torch.device) -> EnergyMeter | None:
        """An energy meter for a run on this device. The meter reads the counters of the processor packages and their memory, if
        they are readable, and that of the GPU if the run uses one. The result is None for a run on the CPU if no counter is
        readable, for a run on a GPU if the GPU's counter is not readable, and for devices of other types."""
        counters = rapl()
        if device.type == "cuda":
            import torch

            try:
                counters["gpu"] = Nvml(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            except Exception:  # NVML raises its own errors, and its package may be missing
                return None
        return cls(counters) if counters and device.type in ("cpu", "cuda") else None

    @property
    def counters(self) -> list[str]:
        """The names of the counters."""
        return list(self._counters)

    def start(self) -> None:
        """Begin a measurement. Energy that was used earlier is not counted."""
        self.used_wh()

    def used_wh(self) -> float | None:
        """The energy used since the last call, in watt-hours; None if a counter failed in this call or in the last one, and in
        the first call."""
        try:
            now = sum(counter.joules() for counter in self._counters.values())
        except Exception:  # NVML raises many kinds of errors
            self._before = None
            return None
        before, self._before = self._before, now
        return None if before is None else (now - before) / _WH


def rapl() -> dict[str, Counter]:
    """The counters of all packages and of their memory, by name, such as ``package-0``; empty if one of them cannot be read.

    Other domains are left out so that nothing is counted twice. The domain of the whole system (psys) contains the packages, and
    the packages contain the cores and the graphics.
    """
    try:
        domains = {domain: (domain / "name").read_text().strip() for domain in sorted(POWERCAP.glob("intel-rapl:*"))}
        return {
            f"{domains[domain.with_name(domain.name.rpartition(':')[0])]}-dram" if name == "dram" else name: Rapl(domain)
            for domain, name in domains.items()
            if name.startswith("package") or name == "dram"
        }
    except (OSError, ValueError, KeyError):
        return {}
