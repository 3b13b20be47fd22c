"""How a command ends at a signal: where its Python is, but in no import."""

import signal
import sys
import threading
import time
from types import FrameType

_REPEATED_S = 0.5
_raised_at = -_REPEATED_S  # by time.monotonic


def stop(number: int, frame: FrameType | None) -> None:
    """A handler: KeyboardInterrupt, once no module is being imported; native ones that are broken
    off abort the process, or let it die of SIGINT.  A repetition that follows at once breaks off
    no clearing up: coreutils' `timeout` signals its command, and then its group with it."""
    global _raised_at
    if time.monotonic() < _raised_at + _REPEATED_S:
        return
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.05, _again, (number,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    _raised_at = time.monotonic()
    raise KeyboardInterrupt


def _again(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:  # wakes the main thread, whatever it waits for
        signal.pthread_kill(threading.main_thread().ident or 0, number)
