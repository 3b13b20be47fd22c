"""Worker processes for work that holds Python's lock: torch and this package imported only once.

An executor of the standard library over a fork server: one fresh interpreter imports what the
workers need, and they are forked from it in milliseconds. Nothing of the caller's state (CUDA,
threads) is forked, and the caller's main script is not run again: it needs no
``if __name__ == "__main__"``, and may be a notebook. Workers end with the program, however it ends.
"""

import contextlib
import copyreg
import functools
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from fresnel.host import machine

MOST_WORKERS = 32
"""What one process can hand work to."""
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOADED = ["fresnel.gate.verdict", "fresnel.poses.epipolar", "PIL.PngImagePlugin"]
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@contextlib.contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """An executor with so many workers of one thread each, killed if the block ends in an error.

    Functions travel by name, tensors as their own bytes (not their whole storage, nor through
    shared memory, whose file descriptors run out). A worker may call this too: its workers are
    forked from the same server, in milliseconds again.

    Raises:
        BrokenProcessPool: (from a future) if a worker died.
    """
    warm_up()
    others = {*multiprocessing.active_children()}
    pool = _Pool(count, multiprocessing.get_context(METHOD), _begin, (_server(),))
    tasks: Any = pool._call_queue  # type: ignore[attr-defined]
    results: Any = pool._result_queue
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        manager: Any = pool._executor_manager_thread
        for worker in {*multiprocessing.active_children()} - others:
            worker.kill()
        if pool.starting:  # one that nobody knows yet, whom the server forks once it has imported
            with contextlib.suppress(KeyError, TypeError, ProcessLookupError):
                os.kill(vars(forkserver._forkserver)["_forkserver_pid"], signal.SIGKILL)
        # This process holds the workers' ends of both pipes, too: threads that wait in the middle
        # of a result, or of a task, would never hear that nobody is left at the other end.
        results._writer.close()
        pool.shutdown(wait=False, cancel_futures=True)
        if manager is not None:
            manager.join(5.0)  # it mostly closes the other itself, and may not do so meanwhile
        tasks._reader.close()
        raise


def warm_up() -> None:
    """Let the fork server import, in the background, what `processes` will soon be asked for."""
    if METHOD == "forkserver":
        forkserver.set_forkserver_preload(_PRELOADED)
        before = dict(os.environ)
        os.environ.update(_ONE_THREAD)
        resource_tracker.ensure_running()  # which would undo the following
        # Ctrl-C is the caller's to answer, also while the server still imports: it inherits this.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver._forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ.clear()
            os.environ.update(before)


class _Pool(ProcessPoolExecutor):
    starting = False
    """Whether it was broken off where workers are started."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer, protocol=5)
        pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _by_value}
        pickler.dump(functools.partial(fn, *args, **kwargs))
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # or a worker that starts ran it
        self.starting = True
        try:
            future = super().submit(_run, buffer.getvalue())
            self.starting = False
            return future
        finally:
            sys.modules["__main__"] = main


def _run(packed: bytes) -> Any:
    return pickle.loads(packed)()


def _by_value(tensor: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.detach().numpy(),)


def _server() -> dict[str, Any]:
    """How to reach the fork server: multiprocessing does not tell those whom it forks."""
    names = ("_forkserver_address", "_forkserver_authkey")  # the second since Python 3.14
    held = vars(forkserver._forkserver)
    return {name: held[name] for name in names if held.get(name)}


def _begin(server: dict[str, Any]) -> None:
    if server:  # or a worker's own workers would wait for a server that imports everything anew
        vars(forkserver._forkserver).update(server, ensure_running=_server)  # it runs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to answer
    torch.set_num_threads(1)
    machine.reuse_memory()  # or each record's megabytes are some 3,000 page faults
    ForkingPickler.register(torch.Tensor, _by_value)  # of results
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: it would outlive a SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
