"""Memory for passes, used again once the last reference to it is gone.

Fresh pages cost as much as the work of a small pass (the system clears each at its first touch),
and autograd decides how long a pass's memory lives: until its graph has been used, or longer with
`retain_graph`. So memory is lent as an array and comes back when that array dies, as any object
does, never earlier. The pool outlives the calls that use it for the same reason that `malloc`'s
does: who frees a graph and who renders next need not know of each other.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Pool:
    """Lends float64 arrays that start at a cache line. Safe to use from any thread, at any time.

    An array may die wherever the garbage collector runs, inside `take` too, so nothing here waits
    for the lock: whoever finds it taken allocates, or lets memory go, as if there were no pool.

    Args:
        limit: bytes kept idle at most; beyond, what has been idle longest is freed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle: list[Array] = []  # longest idle first
        self.idle_bytes = 0
        self.lock = threading.Lock()

    def take(self, size: int) -> Array:
        """Uninitialised memory for at least `size` doubles. Hold on to the array, not to a view."""
        memory = self._reuse(size)
        if memory is None:
            size += size // 8 + 512  # so that it serves a slightly larger pass too
            whole = np.empty(size + 8)
            skip = -whole.ctypes.data // 8 % 8
            memory = whole[skip : skip + size]
        loan = memory[:]
        weakref.finalize(loan, self._give_back, memory).atexit = False
        return loan

    def _reuse(self, size: int) -> Array | None:
        """The smallest idle memory that is enough, if it is not four times too much."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            best, least = -1, 4 * size + 4096
            for i, memory in enumerate(self.idle):
                if size <= memory.size <= least:  # of equals the last: its pages are still warm
                    best, least = i, memory.size
            if best < 0:
                return None
            memory = self.idle.pop(best)
            self.idle_bytes -= memory.nbytes
            return memory
        finally:
            self.lock.release()

    def _give_back(self, memory: Array) -> None:
        if not self.lock.acquire(blocking=False):
            return
        try:
            self.idle.append(memory)
            self.idle_bytes += memory.nbytes
            while self.idle_bytes > self.limit:
                self.idle_bytes -= self.idle.pop(0).nbytes
        finally:
            self.lock.release()
