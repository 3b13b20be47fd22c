"""What the training loop asks of its surroundings: signals, kernels, memory, a progress bar."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Torch reports a failed CPU allocation as a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the CUDA allocator since its last reset, or resident in this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no such module on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
def deterministic(wanted: bool | None, device: torch.device) -> Iterator[None]:
    """Deterministic kernels while inside (None: on a CPU only); warns where there is none."""
    memory: Any = torch.utils.deterministic
    wanted = device.type == "cpu" if wanted is None else wanted
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = memory.fill_uninitialized_memory
    try:
        if wanted:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # costs a write of every new tensor, and nothing here reads uninitialised memory
            memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_before)
        memory.fill_uninitialized_memory = fill_before
