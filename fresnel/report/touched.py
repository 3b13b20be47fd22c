"""Which files a run touches: told by Python itself, to a list that `fresnel.report.cache` reads.

With FRESNEL_TRACE=FILE in its environment, a process that imports this package notes there every
file that its Python code opens, renames or lists from then on: one JSON line [kind, path] each,
kind being "read", "write" or "list". Worker processes inherit the variable, and so do the same.
Not seen: what compiled libraries open by themselves, and programs that don't import this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LISTING = ("os.scandir", "os.listdir")
_IMPORTS = "<frozen importlib._bootstrap_external>"


def trace_files(target: str) -> None:
    """Note, from here on and until this process ends, which files it touches.

    Several processes may write to one list: each line is one small append. The list must be there
    already: a process that could not write to it removes it, and so it stays."""
    try:
        handle = os.open(target, os.O_WRONLY | os.O_APPEND)
    except OSError:
        return
    seen: set[tuple[str, str]] = set()

    def note(kind: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        try:
            entry = (kind, os.path.abspath(os.fsdecode(path)))
        except (TypeError, ValueError, OSError):  # the working directory may be gone
            return
        if entry not in seen:
            seen.add(entry)
            try:
                os.write(handle, (json.dumps(entry) + "\n").encode())
            except OSError:  # a full disk: half a list is worse than none
                with contextlib.suppress(OSError):
                    os.unlink(target)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writing = set(mode) & set("wax+") if mode else flags & _WRITING
            note("write" if writing else "read", path)
            if mode and "+" in mode:
                note("read", path)
        elif event == "os.rename":
            note("write", arguments[1])
        # looking for modules lists every folder of sys.path, which is no reading of data
        elif event in _LISTING and sys._getframe(1).f_code.co_filename != _IMPORTS:
            note("list", arguments[0] if arguments[0] is not None else ".")

    sys.addaudithook(hook)
