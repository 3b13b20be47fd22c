"""What the training loop asks of its surroundings: signals, kernels, memory, a progress bar."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Torch reports a failed CPU allocation as a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the CUDA allocator, or resident in this process, since `reset_peak_memory`.

    Where the system can't reset it (all but Linux), the process' peak is that of its whole life.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        found = re.search(
            r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE
        )
        if found:
            return int(found.group(1)) * 1024
    try:
        import resource
    except ImportError:  # no such module on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` afresh; what the C library holds without using it is given back first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls to what is resident now


def reuse_memory() -> None:
    """Have the C library (glibc) keep what is freed for the next tensor, for this whole process.

    By default it returns every large block to the system, and the next one's pages are mapped and
    zeroed again: ten thousand page faults a training step of a small network.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def has_matrix_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in units of its own (AMX)."""
    with contextlib.suppress(OSError):
        return " amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take: of the card, or of the machine's memory.

    What torch's allocator holds and does not use counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    import psutil

    return int(psutil.virtual_memory().available)


def keep_compiled_code() -> None:
    """Keep what torch.compile makes in the user's cache folder: the next run starts in seconds.

    torch's own default is a temporary folder, which importing its compiler puts into the variable.
    A TORCHINDUCTOR_CACHE_DIR that somebody else set is respected.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "fresnel" / "inductor")


def ways_to_compile(*, tiling: bool) -> list[dict[str, Any]]:
    """Arguments of torch.compile, to be tried in this order.

    Args:
        tiling: with torch's analysis of memory access first. Until 2.12 it broke down on some
            code; it pays where layouts differ, as between convolutions.
    """
    from torch._inductor import list_options

    known = list_options()
    plain: dict[str, Any] = {}
    careful = {k: False for k in ("triton.coalesce_tiling_analysis",) if k in known}
    ways = [plain, careful] if tiling and careful else [careful or plain]
    return [{"options": way} for way in ways]


def bar(total: int, initial: int, shown: bool) -> Any:
    """A progress bar in steps, for terminals and notebooks."""
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=initial, disable=not shown, desc="train", unit="step")


@contextlib.contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; a second one acts."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # handlers can only be set in the main thread
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def kernels(deterministic: bool | None, device: torch.device) -> Iterator[None]:
    """Choose kernels while inside: the same bits twice (None: on a CPU only), or the fastest.

    Deterministic kernels warn where there is none. Otherwise cuDNN tries its algorithms on every
    new shape and keeps the fastest. TF32 stays as it is: geometry needs float32.
    """
    memory: Any = torch.utils.deterministic
    wanted = device.type == "cpu" if deterministic is None else deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before, trials_before = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    try:
        if wanted:
            # cuBLAS reads it when it starts, and keeps to one order of summation
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            # costs a write of every new tensor, and nothing here reads uninitialised memory
            memory.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not wanted
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        memory.fill_uninitialized_memory = fill_before
        torch.backends.cudnn.benchmark = trials_before
