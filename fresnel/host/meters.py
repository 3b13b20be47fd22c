"""What a run takes: peak memory and energy, read from counters that the machine keeps anyway."""

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml

POWERCAP = Path("/sys/class/powercap")


class _Watch:
    """Calls `look` every so many seconds, until it is closed."""

    def __init__(self, every_s: float, look: Callable[[], object]) -> None:
        self._stop = threading.Event()

        def watch() -> None:
            while not self._stop.wait(every_s):
                look()

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class PeakMemory:
    """The highest resident memory of this process and its children (shared pages count in each)
    seen between its making and `close()`, by a sampling thread. `cuda` is for the owner to set."""

    interval_s = 0.1

    def __init__(self) -> None:
        self.cuda: int | None = None
        self._process, self._rss = psutil.Process(), 0
        self._sample()
        self._watch = _Watch(self.interval_s, self._sample)

    def close(self) -> int:
        """Stop watching; returns the peak in bytes."""
        self._watch.close()
        self._sample()
        return self._rss

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
        self._lock, self._reasons = threading.Lock(), list[str]()
        self._packages = _packages(powercap, self._reasons)
        self._gpus = _gpus(nvml, self._reasons)
        # a package's counter wraps round after minutes to hours
        self._watch = _Watch(30.0, self.read) if self._packages else None

    def read(self) -> dict[str, Any]:
        """{"joules", "gpu_joules", "cpu_joules", "source", "reason"} so far.

        joules: the sum of what could be read, None if nothing could; "source" says what that was,
        "reason" why something could not be read."""
        kinds = {"NVML counter of {} GPU(s)": self._gpus}
        kinds["RAPL counter of {} CPU package(s)"] = self._packages
        with self._lock:
            gpu, cpu = (sum(c.joules() for c in some) if some else None for some in kinds.values())
        known = [joules for joules in (gpu, cpu) if joules is not None]
        return {
            "joules": sum(known) if known else None,
            "gpu_joules": gpu,
            "cpu_joules": cpu,
            "source": " + ".join(k.format(len(some)) for k, some in kinds.items() if some) or None,
            "reason": "; ".join(self._reasons) or None,
        }

    def close(self) -> None:
        if self._watch:
            self._watch.close()


class _Counter:
    """Joules since it was made, by a counter that begins at 0 again after `most` units."""

    def __init__(self, now: Callable[[], int], unit_j: float, most: int = 2**64 - 1) -> None:
        self._now, self._unit_j, self._most = now, unit_j, most
        self._last, self._total = now(), 0

    def joules(self) -> float:
        now = self._now()
        self._total += (now - self._last) % (self._most + 1)
        self._last = now
        return self._total * self._unit_j


def _packages(powercap: Path, reasons: list[str]) -> list[_Counter]:
    folders = sorted(f for f in powercap.glob("*") if re.fullmatch(r"\w+-rapl:\d+", f.name))
    counters = []
    for folder in folders:
        file, most = folder / "energy_uj", folder / "max_energy_range_uj"
        if not os.access(file, os.R_OK):
            reasons.append(f"CPU: {file} may not be read by this user")
            return []
        counters.append(_Counter(lambda f=file: int(f.read_text()), 1e-6, int(most.read_text())))  # type: ignore[misc]
    if not folders:
        reasons.append("CPU: this machine shows no RAPL counter")
    return counters


def _gpus(nvml: Any, reasons: list[str]) -> list[_Counter]:
    try:
        nvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        keys = map(str, range(nvml.nvmlDeviceGetCount())) if chosen is None else chosen.split(",")
    except pynvml.NVMLError:
        reasons.append("GPU: no NVIDIA driver")
        return []
    energy = nvml.nvmlDeviceGetTotalEnergyConsumption  # millijoules since the driver was loaded
    counters = []
    for key in (key.strip() for key in keys):
        by_index, by_name = nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID
        with contextlib.suppress(pynvml.NVMLError):  # no such card, or it has no counter
            handle = by_index(int(key)) if key.isdigit() else by_name(key)
            counters.append(_Counter(lambda h=handle: energy(h), 1e-3))  # type: ignore[misc]
    if not counters:
        reasons.append("GPU: NVML shows no energy counter")
    return counters
