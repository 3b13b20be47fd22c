"""How kernels are compiled, cached, and run by several threads at once.

A kernel is a pass in stages, and a stage a number of tasks. Every thread that runs the kernel
claims tasks from an atomic counter until none are left, then waits for those still in the hands of
others. Nobody waits for a thread to arrive: a helper that wakes up late finds nothing to claim and
goes, having touched nothing but the counters. So small passes lose nothing by asking for help, no
result depends on who did what, and when the caller's thread is done, the pass's memory is free.
"""

# mypy: ignore-errors
import contextlib
import functools
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

STAGES = 4
BAD, TOTAL = 16 * STAGES, 16 * STAGES + 8  # what a pass reports back, after its counters
LINES = 16 * STAGES + 16  # int64 of a pass's progress: one cache line for every number

_bare = {"nogil": True, "error_model": "numpy"}
_internal = {**_bare, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inline = numba.njit(forceinline=True, **_internal)
stage = numba.njit(**_internal)


class _Cache(FunctionCache):
    """Numba's cache on disk, told that a kernel is made of all the files beside it.

    By itself it looks at the file of the function that it keeps, and would go on using machine
    code whose callees have been edited in another.
    """

    def _index_key(self, sig, codegen):
        folder = Path(self._py_func.__code__.co_filename).parent
        return (*super()._index_key(sig, codegen), _digest(folder))

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a file that was cut off: compile once more
            self.flush()
            return None


@functools.lru_cache(maxsize=4)
def _digest(folder: Path) -> str:
    """Content hash of the modules in a folder."""
    parts = [f"{p.name}\0".encode() + p.read_bytes() for p in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that threads run without the GIL, and keep the result on disk, if any
    place that Numba knows can be written to."""
    dispatcher = numba.njit(**_bare)(function)
    with contextlib.suppress(RuntimeError):
        dispatcher._cache = _Cache(function)
    return dispatcher


def emits(typed, arity=None):
    """Make an intrinsic of a function that emits code: emit(context, builder, sig, *values).

    `typed` makes (result, *arguments) of the arguments' types: what they are converted to.
    """

    def made(emit, *args):
        result, *want = typed(*args)
        return result(*want), lambda context, builder, sig, values: emit(
            context, builder, sig, *values
        )

    def define(emit):
        by_arity = {  # Numba counts the parameters
            1: lambda typingctx, a: made(emit, a),
            2: lambda typingctx, a, b: made(emit, a, b),
            3: lambda typingctx, a, b, c: made(emit, a, b, c),
            4: lambda typingctx, a, b, c, d: made(emit, a, b, c, d),
        }
        return intrinsic(by_arity[arity or emit.__code__.co_argcount - 3])

    return define


@emits(lambda array, index, number: (types.int64, array, types.intp, types.int64))
def _add(context, builder, sig, array, index, number):
    """Atomically add to an element of an int64 array; returns what it was.

    A release, as the load below is an acquire: who sees the sum sees what was written before it.
    """
    data = context.make_array(sig.args[0])(context, builder, array).data
    return builder.atomic_rmw("add", builder.gep(data, [index]), number, "acq_rel")


@emits(lambda array, index: (types.int64, array, types.intp))
def _look(context, builder, sig, array, index):
    """Atomically load an element of an int64 array."""
    data = context.make_array(sig.args[0])(context, builder, array).data
    return builder.load_atomic(builder.gep(data, [index]), "acquire", 8)


_WINDOWS = sys.platform == "win32"
_sleep = types.ExternalFunction("Sleep" if _WINDOWS else "usleep", types.int32(types.uint32))
_NAP = np.uint32(1 if _WINDOWS else 50)  # milliseconds there, microseconds elsewhere


@inline
def claim(progress, number):
    """The next task of stage `number` for this thread; counts on past the last one."""
    return _add(progress, 16 * number, 1)


@inline
def finish(progress, number, tasks):
    """Report `tasks` claimed tasks of a stage as done."""
    _add(progress, 16 * number + 8, tasks)


@inline
def wait(progress, number, tasks):
    """Return once all `tasks` of a stage are done.

    Most waits are shorter than falling asleep takes. A long one means that whoever has the last
    task has no core: looking on would keep this one from it, and so would yielding, mostly.
    """
    looks = 0
    while _look(progress, 16 * number + 8) < tasks:
        looks += 1
        if looks > 100_000:
            _sleep(_NAP)


@emits(lambda at, size, kind: (types.Array(kind.dtype, 1, "C"), types.intp, types.intp, kind))
def array_at(context, builder, sig, address, size, _):
    """The array of `size` elements at an address. Free, where unpacking an object is not."""
    array = context.make_array(sig.return_type)(context, builder)
    element = context.get_data_type(sig.return_type.dtype)
    width = context.get_constant(types.intp, context.get_abi_sizeof(element))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data, [size], [width], width, None)
    return array._getvalue()


@inline
def floats(address, size):
    return array_at(address, size, np.float32)


@inline
def doubles(address, size):
    return array_at(address, size, np.float64)


@inline
def aligned(size):
    """Uninitialised float32 memory that starts at a cache line: vectors never straddle two."""
    memory = np.empty(size + 16, np.float32)
    skip = (-memory.ctypes.data // 4) % 16
    return memory[skip : skip + size]


class _Crew:
    """Threads that help with passes. They start when first asked for and end with the process."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Any, tuple[Any, ...]]] = queue.SimpleQueue()
        self.lock, self.size = threading.Lock(), 0

    def help(self, function: Any, args: tuple[Any, ...], hands: int) -> None:
        if self.size < hands:
            with self.lock:
                while self.size < hands:
                    self.size += 1
                    name = f"fresnel-render-{self.size}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
        if self.jobs.qsize() < hands:  # else they are held up, and would only come too late
            for _ in range(hands):
                self.jobs.put((function, args))

    def _serve(self) -> None:
        while True:
            function, args = self.jobs.get()
            function(*args)
            del args  # hold on to no one's counters while asleep


_crews: dict[int, _Crew] = {}


def run(function: Any, threads: int, *args: Any) -> np.ndarray[Any, Any]:
    """Run a kernel on this thread and up to `threads - 1` others; returns its progress.

    The kernel's first parameter is that progress. Others may still be on their way in when this
    returns, so the rest must be numbers (addresses of memory among them), not arrays.
    """
    progress = np.zeros(LINES, np.int64)
    if not function.overloads:  # it is compiled, or loaded from Numba's cache: once is enough
        what = (
            f"the CPU renderer's {function.__name__} pass is compiled (about 10 s) or, where this"
        )
        said = (f"fresnel: {what} machine has done so before, loaded; the machine may be busy ...",)
        notice = threading.Timer(2.0, print, said, {"file": sys.stderr, "flush": True})
        notice.daemon = True
        notice.start()
        try:
            function(progress, *args)
        finally:
            notice.cancel()
        return progress
    if threads > 1:
        # A forked child has none of its parent's threads, so every process has a crew of its own.
        crew = _crews.get(os.getpid()) or _crews.setdefault(os.getpid(), _Crew())
        crew.help(function, (progress, *args), threads - 1)
    function(progress, *args)
    return progress
