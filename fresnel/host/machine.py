"""The machine: where the project lies, cores, memory, accelerators.

Nothing here imports torch before it is asked about a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch


def project_root() -> Path:
    """The checkout: the nearest folder above the working directory that holds this project's
    pyproject.toml, else the working directory itself (an installed package run elsewhere)."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "fresnel").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def runs_dir() -> Path:
    """Where data and trainings go: runs/ of the project; in the user's cache where that may not be
    written to."""
    runs = project_root() / "runs"
    return runs if may_write(runs) else cache_dir() / "runs"


def cache_dir() -> Path:
    """The user's folder for what can be made again; a temporary one for who has no home."""
    with contextlib.suppress(RuntimeError):  # nobody knows the home
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if may_write(home):
            return home / "fresnel"
    return Path(tempfile.gettempdir()) / f"fresnel-{os.getuid()}"


def open_files(least: int) -> None:
    """Let this process have so many files open; OSError if it may not."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < least:
        raise OSError(f"{hard} open files are too few, a report needs {least}: ulimit -n {least}")
    if 0 <= soft < least:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))


def may_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which may still have to be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return os.access(there, os.W_OK)


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(device: str = "auto") -> str:
    """Resolve "auto" to "cuda" where torch sees a GPU, else "cpu".

    Raises:
        ValueError: if CUDA is asked for and there is none, or the name is unknown.
    """
    import torch

    there = torch.cuda.is_available()
    if device not in {"auto", "cpu", "cuda"}:
        raise ValueError(f"device: got {device!r}, want 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not there:
        raise ValueError("device: 'cuda' was asked for, but torch sees no GPU; use 'auto' or 'cpu'")
    return ("cuda" if there else "cpu") if device == "auto" else device


def pick_gpus(gpus: str | int, device: str, batch_size: int = 0, accumulate: int = 1) -> int:
    """Processes to work in, one a GPU: a number, or "auto" for the most that can share a step of
    so many samples, in so many parts at least, equally. On a CPU "auto" is one.

    Raises:
        ValueError: for more than the machine has GPUs (a CPU: cores), or no number.
    """
    import torch

    on_gpu = device.startswith("cuda")
    there = torch.cuda.device_count() if on_gpu else core_count()
    if gpus == "auto":
        parts = {count: max(count, accumulate) for count in range(2, there + 1) if on_gpu}
        return max([1, *(n for n, p in parts.items() if batch_size % p == p % n == 0)])
    if not re.fullmatch(r"[1-9]\d*", str(gpus)) or int(gpus) > there:
        what = "GPUs" if on_gpu else "CPU cores and no GPU"
        raise ValueError(f"gpus: got {gpus!r}, want 'auto' or 1 to {there}: this machine's {what}")
    return int(gpus)


def cards(device: str, count: int = 1) -> str:
    """The first so many GPUs by name, such as "2 x NVIDIA H100"; processes, where it is a CPU."""
    import torch

    if not device.startswith("cuda"):
        return f"{count} processes on the CPU" if count > 1 else "the CPU"
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    found = {name: names.count(name) for name in names}
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in found.items())


def accelerators() -> list[str]:
    """GPUs that the system shows, and which of them may be used; [] where there is none."""
    found = [
        path for path in Path("/dev").glob("*") if re.match(r"(nvidia\d+|kfd|dxg)$", path.name)
    ]
    choosers = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    chosen = [f"{name}={os.environ[name]}" for name in choosers if name in os.environ]
    return sorted(map(str, found)) + chosen if found else []


def cuda() -> Any:
    """torch.cuda where it works, else None. Does not import torch: a run that never did has none
    of its memory to measure."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def has_matrix_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in units of its own (AMX)."""
    with contextlib.suppress(OSError):
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch reports a failed CPU allocation as a plain RuntimeError."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the CUDA allocator, or resident in this process, since `reset_peak_memory`; where
    the system keeps no such peak (all but Linux), what is resident now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(found.group(1)) * 1024
    return psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` afresh; what the C library holds without using it is given back first."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to what is resident now


def reuse_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next tensor, for this whole process.

    By default it returns every large block to the system, and the next one's pages are mapped and
    zeroed again: ten thousand page faults a training step of a small network.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system or C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
