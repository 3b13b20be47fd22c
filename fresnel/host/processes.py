"""Worker processes for work that holds Python's lock: torch and this package imported only once.

A `Crew` is an executor. On Linux it starts one fresh interpreter, which imports what the workers
need and then forks them; each answers on a socket of its own. So sixteen workers cost one import,
nothing of the caller's state (CUDA, threads) is forked, and the caller's main script is not run
again: it needs no ``if __name__ == "__main__"``, and may be a notebook. Elsewhere the workers are
spawned by `multiprocessing`, with its conditions.

A crew is `lend`-ed: whoever asks next within a minute finds the last one's, its import paid.
`prepare` has one start beside other work.

Workers end with their crew, and with the program, however that ends: what they wait on is then
closed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

_FORKS = sys.platform == "linux"
# What comes after our own modules they import on their first task.
_PRELOADED = (
    *("fresnel.data.dataset", "fresnel.gate.verdict", "fresnel.gate.epipolar"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PpmImagePlugin"),
    *("PIL.PngImagePlugin", "numpy.ma"),
)
_KEPT_S = 60.0
MOST_WORKERS = 32
"""What one process can hand work to, and the same for all who lend, so that one crew will do."""
_SERVE = (
    "import sys; sys.path[:] = {path!r}; from fresnel.host.processes import _serve; _serve({fds})"
)
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
_KILLED = "a worker process was killed, perhaps for want of memory; use fewer cores or try again"


class Crew(Executor):
    """``workers`` processes, starting in the background; what is submitted meanwhile waits.

    Functions travel by name, tensors as their own bytes (not their whole storage, nor through
    shared memory, whose file descriptors run out).  It is `awake` once one has answered.

    Raises (from a future):
        BrokenProcessPool: if a worker died.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._folder = _folder()  # paths that travel may be relative
        self._lock = threading.Lock()
        self._open = 0
        self.awake = False
        self._spawned: ProcessPoolExecutor | None = None
        if not _FORKS:
            context = multiprocessing.get_context("spawn")
            self._spawned = ProcessPoolExecutor(workers, context, _alone)
            return
        pairs = [socket.socketpair() for _ in range(workers)]
        theirs = [end.fileno() for _, end in pairs]
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(path=sys.path, fds=theirs)],
            stdin=subprocess.DEVNULL,
            env=os.environ | _ONE_THREAD,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C is the caller's to answer
        )
        for _, end in pairs:
            end.close()
        self._connections = [Connection(end.detach()) for end, _ in pairs]
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for connection in self._connections:
            self._idle.put(connection)
        self._threads = ThreadPoolExecutor(workers, "crew")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        task = functools.partial(fn, *args, **kwargs)
        if self._spawned is not None:
            return self._spawned.submit(_unpacked, bytes(pack(task)))
        with self._lock:
            self._open += 1
        return self._threads.submit(self._ask, task)

    def _ask(self, task: Callable[[], Any]) -> Any:
        packed = pack(task)
        connection = self._idle.get()
        try:
            connection.send_bytes(packed)
            good, value = pickle.loads(connection.recv_bytes())
            self.awake = True
        except (EOFError, OSError):
            connection.close()
            raise BrokenProcessPool(_KILLED) from None
        finally:
            self._idle.put(connection)
            with self._lock:
                self._open -= 1
        if not good:
            raise value
        return value

    def fit(self) -> bool:
        """Whether all workers live, here, with nothing to do: one that ended can be read from."""
        return (
            self._spawned is None
            and self._open == 0
            and self._folder == _folder()
            and self._server.poll() is None
            and not any(end.closed or end.poll() for end in self._connections)
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers; with ``cancel_futures`` at once, in the middle of what they do."""
        if self._spawned is not None:
            self._spawned.shutdown(wait, cancel_futures=cancel_futures)
            return
        self._threads.shutdown(wait=False, cancel_futures=cancel_futures)
        if cancel_futures:
            self._kill()
        if wait:
            self._threads.shutdown()
            for connection in self._connections:
                connection.close()
            self._kill()  # idle by now; asked nicely, they spend half a second on leaving
            self._server.wait()

    def _kill(self) -> None:
        if self._server.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._server.pid, signal.SIGKILL)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.shutdown(cancel_futures=kind is not None)


class _Kept:
    """The crew that nobody has at present, if there is one, and when it is to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._crew: Crew | None = None
        self._ending: threading.Timer | None = None

    def take(self, workers: int) -> Crew | None:
        """One of at least so many workers."""
        crew = self._exchange(None)
        if crew is not None and not (crew.workers >= workers and crew.fit()):
            crew.shutdown(cancel_futures=True)
            return None
        return crew

    def put(self, crew: Crew | None) -> None:
        old = self._exchange(crew)
        if old is not None:
            old.shutdown(cancel_futures=True)

    def _exchange(self, crew: Crew | None) -> Crew | None:
        with self._lock:
            if self._ending is not None:
                self._ending.cancel()
            self._ending = threading.Timer(_KEPT_S, self._end, (crew,)) if crew else None
            if self._ending is not None:
                self._ending.daemon = True
                self._ending.start()
            old, self._crew = self._crew, crew
            return old

    def _end(self, crew: Crew) -> None:
        with self._lock:
            if self._crew is not crew:
                return
            self._crew = self._ending = None
        crew.shutdown(cancel_futures=True)


_kept: dict[int, _Kept] = {}
"""By process: a fork must not talk to its parent's workers."""


def _keeper() -> _Kept:
    if not _kept:
        atexit.register(lambda: _keeper().put(None))
    return _kept.get(os.getpid()) or _kept.setdefault(os.getpid(), _Kept())


def prepare(workers: int) -> None:
    """Let a crew start in the background that `lend` will soon be asked for."""
    if _FORKS:
        _keeper().put(_keeper().take(workers) or Crew(workers))


@contextlib.contextmanager
def lend(workers: int) -> Iterator[Crew]:
    """A crew of at least so many workers. It is kept for the next one, unless it has been left
    with something to do, by an error or by purpose: then its workers end at once."""
    crew = _keeper().take(workers) or Crew(workers)
    try:
        yield crew
    except BaseException:
        crew.shutdown(cancel_futures=True)
        raise
    if crew.fit():
        _keeper().put(crew)
    else:
        crew.shutdown(cancel_futures=True)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # removed meanwhile
        return None


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(value) is not torch.Tensor or value.device.type != "cpu":
            return NotImplemented
        try:
            return torch.from_numpy, (value.detach().numpy(),)
        except TypeError:  # a dtype that numpy lacks
            return NotImplemented


def pack(value: Any) -> memoryview:
    """Pickled, tensors by value."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getbuffer()


def _answer(packed: bytes) -> memoryview:
    """(True, result) or (False, exception), packed."""
    try:
        return pack((True, pickle.loads(packed)()))
    except Exception as error:
        error.add_note("In a worker process:\n" + traceback.format_exc())
        try:
            answer = pack((False, error))
            pickle.loads(answer)  # some exceptions go in and don't come out
            return answer
        except Exception:
            return pack((False, RuntimeError(f"{type(error).__name__}: {error}")))


def _unpacked(packed: bytes) -> Any:
    return pickle.loads(packed)()


def _alone() -> None:
    import torch

    torch.set_num_threads(1)


def _serve(fds: Sequence[int]) -> None:
    """Import, fork a worker for each socket, and wait for the last to end."""
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or the first collection would copy every page
    for fd in fds:
        if os.fork() == 0:
            for other in fds:
                if other != fd:
                    with contextlib.suppress(OSError):
                        os.close(other)
            _work(Connection(fd))
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _work(connection: Connection) -> None:
    _alone()
    try:
        while True:
            connection.send_bytes(_answer(connection.recv_bytes()))
    except (EOFError, OSError, KeyboardInterrupt):  # nobody waits for this any more
        pass
    finally:
        os._exit(0)  # nothing of the server is to be run at its end once more
