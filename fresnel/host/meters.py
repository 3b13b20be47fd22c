"""What a run takes: peak memory and energy, read from counters that the machine keeps anyway."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class PeakMemory:
    """The highest resident memory of this process and its children (shared pages count in each)
    seen between its making and `close()`, by a sampling thread. `cuda` is for the owner to set."""

    interval_s = 0.1

    def __init__(self) -> None:
        import psutil

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
        import psutil

        total = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:  # it ended in between
                continue
        self._rss = max(self._rss, total)


class EnergyMeter:
    """Joules that the machine took since the meter was made, where a counter can be read.

    CPU packages: Linux's powercap counters (RAPL; Intel and AMD; often readable by root alone).
    GPUs: NVML's energy counter, or its power integrated over one-second samples where a card has no
    counter. Both count the whole device, other programs on it included. The GPUs are those of
    CUDA_VISIBLE_DEVICES, by NVML's order; all of them without it.
    """

    def __init__(self, powercap: Path = POWERCAP, nvml: Any = None) -> None:
        self._lock = threading.Lock()
        self._reasons: list[str] = []
        self._packages = [_Package(path) for path in self._readable(powercap)]
        self._gpus = _gpus(nvml if nvml is not None else _load_nvml(), self._reasons)
        self._stop = threading.Event()
        sampled = any(not gpu.counts for gpu in self._gpus)
        # a package's counter wraps round after minutes to hours
        self._interval_s = 1.0 if sampled else 30.0
        if self._packages or sampled:
            threading.Thread(target=self._watch, daemon=True).start()

    def read(self) -> dict[str, Any]:
        """{"joules", "gpu_joules", "cpu_joules", "source", "reason"} so far.

        joules: the sum of what could be read, None if nothing could; "source" says what that was,
        "reason" why something could not be read."""
        with self._lock:
            cpu = sum(p.joules() for p in self._packages) if self._packages else None
            gpu = sum(g.joules() for g in self._gpus) if self._gpus else None
        parts = [part for part in (gpu, cpu) if part is not None]
        sources = []
        if self._gpus:
            how = "counter" if all(g.counts for g in self._gpus) else "power, sampled"
            sources.append(f"NVML {how} of {len(self._gpus)} GPU(s)")
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
        while not self._stop.wait(self._interval_s):
            with self._lock:
                for package in self._packages:
                    package.joules()
                for gpu in self._gpus:
                    gpu.joules()

    def _readable(self, powercap: Path) -> list[Path]:
        folders = sorted(powercap.glob("*-rapl:*")) if powercap.is_dir() else []
        folders = [f for f in folders if re.fullmatch(r"\w+-rapl:\d+", f.name)]
        if not folders:
            self._reasons.append("CPU: this machine shows no RAPL counter")
        readable = [folder for folder in folders if os.access(folder / "energy_uj", os.R_OK)]
        if len(readable) < len(folders):
            self._reasons.append(f"CPU: {folders[0] / 'energy_uj'} may not be read by this user")
            return []
        return readable


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


class _Gpu:
    """One card: millijoules since its driver was loaded, or else milliwatts now."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle
        self._first = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        self.counts = self._first is not None
        self.readable = self.counts or self._watts() is not None
        self._when, self._total = time.monotonic(), 0.0

    def joules(self) -> float:
        if self.counts:
            now = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
            if now is not None and self._first is not None:
                self._total = (now - self._first) / 1e3
        else:
            moment = time.monotonic()
            self._total += (self._watts() or 0.0) * (moment - self._when)
            self._when = moment
        return self._total

    def _watts(self) -> float | None:
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", ctypes.c_uint())
        return None if milliwatts is None else milliwatts / 1e3

    def _ask(self, function: str, value: Any) -> int | None:
        failed = getattr(self._library, function)(self._handle, ctypes.byref(value))
        return None if failed else int(value.value)


def _load_nvml() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


def _gpus(library: Any, reasons: list[str]) -> list[_Gpu]:
    if library is None:
        reasons.append("GPU: no NVIDIA driver")
        return []
    handles = [handle for key in _visible(library) if (handle := _handle(library, key)) is not None]
    gpus = [gpu for handle in handles if (gpu := _Gpu(library, handle)).readable]
    if not gpus:
        reasons.append("GPU: NVML shows neither energy nor power")
    return gpus


def _visible(library: Any) -> Sequence[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [key.strip() for key in chosen.split(",") if key.strip()]
    count = ctypes.c_uint()
    failed = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return [] if failed else [str(index) for index in range(count.value)]


def _handle(library: Any, key: str) -> Any:
    handle = ctypes.c_void_p()
    if key.isdigit():
        failed = library.nvmlDeviceGetHandleByIndex_v2(
            ctypes.c_uint(int(key)), ctypes.byref(handle)
        )
    else:
        failed = library.nvmlDeviceGetHandleByUUID(
            ctypes.c_char_p(key.encode()), ctypes.byref(handle)
        )
    return None if failed else handle
