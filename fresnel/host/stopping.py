"""How a command ends at a signal: where its Python is, but in no import."""

import signal
import sys
import threading
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    """A handler: KeyboardInterrupt, once no module is being imported; native ones that are broken
    off abort the process, or let it die of SIGINT."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            again = threading.Timer(0.05, _again, (number,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _again(number: int) -> None:
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:  # wakes the main thread, whatever it waits for
        signal.pthread_kill(threading.main_thread().ident or 0, number)
