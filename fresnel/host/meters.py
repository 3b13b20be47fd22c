"""What a run takes: peak memory and energy, read from counters that the machine keeps anyway."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml

POWERCAP = Path("/sys/class/powercap")


class PeakMemory:
    """The highest resident memory of this process and its children (shared pages count in each)
    seen between its making and `close()`, by a sampling thread. `cuda` is for the owner to set."""

    interval_s = 0.1

    def __init__(self) -> None:
        self.cuda: int | None = None
        self._process = psutil.Process()
        self._rss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()
        self._thread.start()

    def close(self) -> int:
        """Stop watching; returns the peak in bytes."""
        self._stop.set()
        self._thread.join()
        self._sample()
        return self._rss

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._sample()

    def _sample(self) -> None:
        total = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ended in between
                total += child.memory_info().rss
        self._rss = max(self._rss, total)


class EnergyMeter:
    """Joules that the machine took since the meter was made, where a counter can be read.

    CPU packages: Linux's powercap counters (RAPL; Intel and AMD; often readable by root alone).
    GPUs: NVML's energy counter, which every card since Volta has. Both count the whole device,
    other programs on it included. The GPUs are those of CUDA_VISIBLE_DEVICES, by NVML's order; all
    of them without it.
    """

    def __init__(self, powercap: Path = POWERCAP, nvml: Any = pynvml) -> None:
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._reasons: list[str] = []
        self._packages = [_Package(path) for path in _readable(powercap, self._reasons)]
        self._gpus = _gpus(nvml, self._reasons)
        if self._packages:
            threading.Thread(target=self._watch, daemon=True).start()

    def read(self) -> dict[str, Any]:
        """{"joules", "gpu_joules", "cpu_joules", "source", "reason"} so far.

        joules: the sum of what could be read, None if nothing could; "source" says what that was,
        "reason" why something could not be read."""
        with self._lock:
            cpu = sum(package.joules() for package in self._packages) if self._packages else None
        gpu = sum(joules() for joules in self._gpus) if self._gpus else None
        parts = [part for part in (gpu, cpu) if part is not None]
        sources = [f"NVML counter of {len(self._gpus)} GPU(s)"] if self._gpus else []
        if self._packages:
            sources.append(f"RAPL counter of {len(self._packages)} CPU package(s)")
        return {
            "joules": sum(parts) if parts else None,
            "gpu_joules": gpu,
            "cpu_joules": cpu,
            "source": " + ".join(sources) or None,
            "reason": "; ".join(self._reasons) or None,
        }

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(30.0):  # a package's counter wraps round after minutes to hours
            self.read()


class _Package:
    """A CPU package's counter, which begins at 0 again after `max_energy_range_uj`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = int(self._file.read_text()), 0

    def joules(self) -> float:
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6


def _readable(powercap: Path, reasons: list[str]) -> list[Path]:
    folders = sorted(f for f in powercap.glob("*") if re.fullmatch(r"\w+-rapl:\d+", f.name))
    if not folders:
        reasons.append("CPU: this machine shows no RAPL counter")
    if all(os.access(folder / "energy_uj", os.R_OK) for folder in folders):
        return folders
    reasons.append(f"CPU: {folders[0] / 'energy_uj'} may not be read by this user")
    return []


def _since(energy: Callable[[Any], int], handle: Any, first: int) -> float:
    return (energy(handle) - first) / 1e3


def _gpus(nvml: Any, reasons: list[str]) -> list[Callable[[], float]]:
    """A function a card: joules since now."""
    try:
        nvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        keys = map(str, range(nvml.nvmlDeviceGetCount())) if chosen is None else chosen.split(",")
    except pynvml.NVMLError:
        reasons.append("GPU: no NVIDIA driver")
        return []
    energy = nvml.nvmlDeviceGetTotalEnergyConsumption  # millijoules since the driver was loaded
    gpus: list[Callable[[], float]] = []
    for key in (key.strip() for key in keys):
        by_index, by_name = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
        with contextlib.suppress(pynvml.NVMLError):  # no such card, or it has no counter
            handle = by_index(int(key)) if key.isdigit() else by_name(key)
            gpus.append(functools.partial(_since, energy, handle, energy(handle)))
    if not gpus:
        reasons.append("GPU: NVML shows no energy counter")
    return gpus
