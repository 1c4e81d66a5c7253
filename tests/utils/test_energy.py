"""Energy counters are read from a folder like that of Linux's powercap, and from a module like NVML's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fa_bench.runs import callbacks
from fa_bench.runs.callbacks import Energy
from fa_bench.runs.loop import Progress
from fa_bench.utils import energy
from fa_bench.utils.energy import EnergyMeter, rapl

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for folder, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("7199999999\n")
        use(tmp_path, folder, 0)
    return tmp_path


def use(powercap: Path, folder: str, joules: int) -> None:
    (powercap / folder / "energy_uj").write_text(f"{joules * 10**6}\n")


def meter_of(device: torch.device) -> EnergyMeter:
    meter = EnergyMeter.of(device)
    assert meter is not None
    meter.start()
    return meter


def test_package_and_dram_energy_is_counted_once(powercap: Path) -> None:
    meter = meter_of(CPU)
    assert meter.counters == ["package-0", "package-0-dram"]
    for folder in powercap.iterdir():
        use(powercap, folder.name, 3600)
    assert meter.used_wh() == pytest.approx(2)
    assert meter.used_wh() == 0


def test_counters_wrap_around(powercap: Path) -> None:
    use(powercap, "intel-rapl:0", 7000)
    meter = meter_of(CPU)
    for _ in range(2):  # each time, the counter goes from 100 J below its end to 100 J above its beginning
        use(powercap, "intel-rapl:0", 7100)
        meter.used_wh()
        use(powercap, "intel-rapl:0", 100)
        assert meter.used_wh() == pytest.approx(200 / 3600)


def test_no_meter_without_readable_counters(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    assert rapl() == {} and EnergyMeter.of(CPU) is None
    use(powercap, "intel-rapl:0", 0)
    read = Path.read_text

    def refused(path: Path, *arguments, **options) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    assert EnergyMeter.of(CPU) is None
    monkeypatch.setattr(energy, "POWERCAP", powercap / "missing")
    assert EnergyMeter.of(CPU) is None


def test_failed_counter_makes_energy_unknown(powercap: Path) -> None:
    meter = meter_of(CPU)
    counter = powercap / "intel-rapl:0" / "energy_uj"
    before = counter.read_text()
    counter.unlink()
    meter.start()
    counter.write_text(before)
    assert meter.used_wh() is None, "the energy before the start was counted"
    assert meter.used_wh() == 0
    counter.unlink()
    assert meter.used_wh() is None


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU whose counter shows `millijoules`."""
    module = SimpleNamespace(millijoules=5, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID={"GPU-7": "handle"}.__getitem__)
    module.nvmlDeviceGetTotalEnergyConsumption = lambda device: {"handle": module.millijoules}[device]
    monkeypatch.setitem(sys.modules, "pynvml", module)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="7"))
    return module


def test_gpu_energy_is_added_to_available_cpu_counters(powercap: Path, nvml, monkeypatch) -> None:
    meter = meter_of(GPU)
    assert meter.counters == ["package-0", "package-0-dram", "gpu"]
    nvml.millijoules += 3_600_000
    use(powercap, "intel-rapl:0", 7200)
    assert meter.used_wh() == pytest.approx(3)
    monkeypatch.setattr(energy, "POWERCAP", powercap / "missing")
    assert meter_of(GPU).counters == ["gpu"]


def test_no_meter_without_gpu_counter(powercap: Path, nvml, monkeypatch) -> None:
    monkeypatch.delattr(nvml, "nvmlDeviceGetTotalEnergyConsumption")
    assert EnergyMeter.of(GPU) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.of(GPU) is None


def test_run_sums_energy_excluding_interruptions(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "ENERGY_EVERY", 0)
    meter = EnergyMeter.of(CPU)
    assert meter is not None
    trainer = SimpleNamespace(progress=Progress())
    callback = Energy(meter)
    use(powercap, "intel-rapl:0", 1000)  # before the run
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    for joules in (1900, 2800):
        use(powercap, "intel-rapl:0", joules)
        callback.on_step_end(trainer)  # type: ignore[arg-type]
    assert trainer.progress.energy_wh == pytest.approx(0.5)
    trainer.progress.step = 2
    use(powercap, "intel-rapl:0", 5000)  # while it was interrupted
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    use(powercap, "intel-rapl:0", 5900)
    callback.on_fit_end(trainer)  # type: ignore[arg-type]
    assert trainer.progress.energy_wh == pytest.approx(0.75)


def test_resumed_run_without_earlier_energy_stays_unmeasured(powercap: Path) -> None:
    trainer = SimpleNamespace(progress=Progress(step=3))
    callback = Energy(meter_of(CPU))
    callback.on_fit_start(trainer)  # type: ignore[arg-type]
    use(powercap, "intel-rapl:0", 100)
    callback.on_fit_end(trainer)  # type: ignore[arg-type]
    assert trainer.progress.energy_wh is None
